"""Processes that work together: what they decide together, and what their errors mean."""
