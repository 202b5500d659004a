"""The Trainer on several processes."""
