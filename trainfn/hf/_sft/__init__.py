"""`SFTTrainer`: supervised fine-tuning of causal language models."""
