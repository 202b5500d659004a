"""Logs, trackers and the Hub."""
