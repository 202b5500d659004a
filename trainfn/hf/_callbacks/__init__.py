"""Events, decisions, and what a callback may read."""
