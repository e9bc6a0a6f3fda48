"""The memory that this machine has free, and what a process with its own children holds. Linux; else unknown."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["data_bytes", "free_memory", "resident_bytes"]

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_DEEPEST: Final = 8  # generations of processes that are looked at


def free_memory() -> int | None:
    """Bytes that this process can still get: of the machine or of its control group, whichever is less."""
    found = [value for value in (_machine(), _group()) if value is not None]
    return min(found, default=None)


def _machine() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(lines[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _group() -> int | None:
    """Of control groups of version 2 or 1, this one and those around it; nothing where there is no limit.

    Files that the group has cached and does not use are as good as free.
    """
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    found: list[int] = []
    for _, controllers, name in lines:
        if not controllers:
            root, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / name.lstrip("/")
        for place in (folder, *folder.parents):
            if place != root and root not in place.parents:
                break
            if (left := _left(place, *files)) is not None:
                found.append(left)
    return min(found, default=None)


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        if most == "max" or int(most) >= 1 << 60:  # version 1 writes "no limit" as a huge number
            return None
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        return max(int(most) - now + int(stat.get(cached, 0)), 0)
    except (OSError, ValueError):
        return None


def resident_bytes(process: int) -> int:
    """What a process and all that it started hold in memory; 0 where that can't be known."""
    total, generation = 0, [process]
    for _ in range(_DEEPEST):
        following: list[int] = []
        for one in generation:
            with suppress(OSError, ValueError, IndexError):
                total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * _PAGE
            for tasks in _tasks(one):
                with suppress(OSError, ValueError):
                    following += map(int, Path(tasks, "children").read_text().split())
        generation = following
        if not generation:
            break
    return total


def _tasks(process: int) -> list[str]:
    try:
        with os.scandir(f"/proc/{process}/task") as found:
            return [entry.path for entry in found]
    except OSError:
        return []


def data_bytes(process: int) -> int | None:
    """What counts towards a process's RLIMIT_DATA now: its private memory that can be written, touched or not."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
