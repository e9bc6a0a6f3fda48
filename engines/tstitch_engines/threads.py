"""How many CPU threads engines may have, and how many they have by default."""

from __future__ import annotations

import os

from tstitch_engines.checks import check_whole
from tstitch_engines.errors import BadInput

__all__ = ["check_threads", "default_threads", "most_threads"]


def most_threads() -> int:
    """Four for each core of this machine, and at least 64: more are never faster, and each engine starts its own."""
    return max(64, 4 * (os.cpu_count() or 1))


def check_threads(value: object, what: str = "threads") -> int:
    """A number of threads, 0 for ``default_threads``. Raises ``BadInput``."""
    return check_whole(value, what, 0, most_threads())


def default_threads() -> int:
    """``$OMP_NUM_THREADS``, which PyTorch reads by itself and ONNX Runtime does not; else 0, all cores.

    The first of a list counts (OpenMP 4.0, section 4.2: one number per level of nesting). Raises ``BadInput`` for what
    is no number of threads.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not first:
        return 0
    if not (first.isascii() and first.isdecimal() and len(first) < 10 and 1 <= int(first) <= most_threads()):
        raise BadInput(
            f"OMP_NUM_THREADS is {first[:80]!r}; allowed is a whole number from 1 to {most_threads()}",
            hint="set it to the number of threads, unset it, or say threads=N (--threads N)",
        )
    return int(first)
