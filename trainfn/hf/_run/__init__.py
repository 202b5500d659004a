"""A training run, from the first batch to the last: data, position, loop, search."""
