"""Checkpoints of the Trainer, and those that transformers wrote."""
