"""A run: the loop around a step, its batches, its signals, and where it resumes."""
