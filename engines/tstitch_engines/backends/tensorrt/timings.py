"""The file of kernel timings (option ``timing-cache``), which builds read and add to, at once too."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tstitch_engines.backends.tensorrt.api import Config, TimingCache
from tstitch_engines.backends.tensorrt.library import Session
from tstitch_engines.bundle.files import replace_file
from tstitch_engines.errors import BuildFailed

__all__ = ["read_timings", "write_timings"]


def read_timings(opened: Session, config: Config, path: Path) -> TimingCache:
    """Gives ``config`` the timings in ``path``. One of another GPU or version is refused; kernels are timed again."""
    found = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if found is not None and config.set_timing_cache(found, False):
        return found
    opened.messages.add(logging.WARNING, f"{path.name} is of another GPU or version: kernels are timed again")
    found = config.create_timing_cache(b"")
    if found is None or not config.set_timing_cache(found, False):
        raise BuildFailed(f"{opened} makes no timing cache: {opened.messages.reason()}", hint="leave it out")
    return found


def write_timings(config: Config, given: TimingCache, path: Path) -> None:
    """Adds to ``path`` what was timed; what other builds wrote there meanwhile stays. Raises ``OSError``."""
    kept = config.get_timing_cache() or given
    with _alone(path):
        there = config.create_timing_cache(path.read_bytes()) if path.exists() else None
        if there is not None:
            kept.combine(there, False)  # false for those of another GPU or version, which these replace
        replace_file(path, bytes(memoryview(kept.serialize())))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A lock between processes, on a file beside ``path`` that stays: removing it would let two in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
