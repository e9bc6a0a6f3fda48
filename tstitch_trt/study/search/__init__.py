"""Searching for the schedules that are best at their cost."""
