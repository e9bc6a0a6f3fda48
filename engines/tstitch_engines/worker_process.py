"""Processes of our own that do what may crash, leak or run out of memory: started, ended and asked what went wrong."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

__all__ = ["end_with_parent", "how_it_ended", "start_worker", "tail"]

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_TAIL: Final = 2000  # characters of stderr that an error quotes at most


def start_worker(module: str, stderr: IO[bytes], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts ``python -m module`` with pipes for stdin and stdout; it finds our modules where this process does.

    It has a session of its own: Ctrl-C in the terminal reaches the caller only, who kills it. ``-P`` keeps modules in
    the working directory out.
    """
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    return subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        start_new_session=True,
    )


def end_with_parent() -> None:
    """Called in the worker: the kernel kills it when its parent dies."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def how_it_ended(code: int) -> str:
    """A return code in words: ``exit code 3``, ``signal SIGSEGV``."""
    known = {one.value: one.name for one in signal.Signals}
    return f"exit code {code}" if code >= 0 else f"signal {known.get(-code, str(-code))}"


def tail(stderr: IO[bytes]) -> str:
    """The end of what a worker wrote to the file ``stderr``, on one line."""
    end = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(end - _TAIL, 0))
    text = stderr.read().decode(errors="replace")
    return " | ".join(line.strip() for line in text.splitlines()[-5:] if line.strip())
