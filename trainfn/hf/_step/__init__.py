"""One update of the Trainer: its loss, its modes, its micro-batches."""
