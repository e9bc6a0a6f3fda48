"""Fusing LoRAs (arXiv 2106.09685) into weights."""
