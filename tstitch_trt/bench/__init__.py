"""Measuring latency, beside PyTorch on the same weights."""
