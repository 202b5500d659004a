"""The optimizer and the schedule of a run."""
