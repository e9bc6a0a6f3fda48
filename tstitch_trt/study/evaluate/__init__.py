"""Measuring speed and quality of schedules."""
