"""`TrainingArguments`: every field, what reads it, and what older names are called today."""
