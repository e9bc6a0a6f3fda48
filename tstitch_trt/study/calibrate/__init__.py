"""Measuring what steps cost on this machine."""
