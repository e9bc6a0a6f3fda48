"""How many CPU threads a library gets that is told no number."""

from __future__ import annotations

import os

__all__ = ["default_threads"]


def default_threads() -> int:
    """``$OMP_NUM_THREADS``, which PyTorch follows by itself and ONNX Runtime does not; 0, for all cores, without it.

    Of a list (OpenMP 4.0, section 4.2: one number for each level of nesting) the first; what is no number above 0 does
    not count.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0
