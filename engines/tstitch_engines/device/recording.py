"""One lock for what must not happen while a stream is recorded."""

from __future__ import annotations

import os
import threading
from typing import Final

__all__ = ["RECORDING", "is_held_here"]

RECORDING: Final = threading.RLock()
"""Held by whoever records a stream, or in this process compiles for a GPU, or loads, refits or frees an engine there.

Recording switches the garbage collector off, which the process has one of: two recorders would undo each other. And
all the others allocate, free and wait in ways that break the recording of another thread on the same device
(NVIDIA/TensorRT issue 2888).

It is taken inside a runtime's turn, and whoever holds it asks for no turn: so no two threads wait for each other. The
thread that holds it may take it again. A fork has none of the other threads, and so not what they hold.
"""


def is_held_here() -> bool:
    """Whether the calling thread holds it: what runs is a signal handler or a finaliser, in the middle of that work."""
    return bool(RECORDING._is_owned())  # type: ignore[attr-defined]


def _forget_others() -> None:
    if not is_held_here():
        RECORDING._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_others)
