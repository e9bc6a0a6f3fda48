"""The parts of ``benchmarks/gpu.py``; see ``benchmarks/README.md``."""
