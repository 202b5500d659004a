"""`TrainingArguments`: every field, its reader, and the older names that are translated."""
