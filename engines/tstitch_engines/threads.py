"""The default number of CPU threads."""

from __future__ import annotations

import os

__all__ = ["default_threads"]


def default_threads() -> int:
    """``$OMP_NUM_THREADS``, which PyTorch reads by itself and ONNX Runtime does not; else 0, all cores.

    The first of a list counts (OpenMP 4.0, section 4.2: one number per level of nesting).
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0
