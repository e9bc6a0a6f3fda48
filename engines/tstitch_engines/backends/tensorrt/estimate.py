"""How much memory and time a compilation will take, before it starts.

From measurements with TensorRT-RTX 1.7 on two CPU cores, plan written as a stream (peak resident memory of the
process, seconds), ONNX of
    2 to 30 MB      0.6 to 1.2 GB     0.3 to 6 s
    1.5 GB          4.0 GB            15 s
    2.4 GB          5.2 GB            4 s (files in the page cache) to 13 s
which ``1 GB + 2 x ONNX`` and ``3 s + 8 s per GB`` cover; without the stream the plan is in memory once more (7.4 GB
were measured for 2.4 GB). TensorRT itself runs its candidates on the GPU, and nothing was measured there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Estimate", "estimate", "free_memory"]

_BASE_BYTES: Final = 1 << 30
_BASE_SECONDS: Final = 3.0
_SECONDS_PER_BYTE: Final = 8.0 / 1e9


class Estimate(NamedTuple):
    """``seconds`` is ``None`` where nothing is known."""

    memory: int
    seconds: float | None

    def __str__(self) -> str:
        time = "minutes" if self.seconds is None else f"{self.seconds:.0f} s"
        return f"about {self.memory / 2**30:.1f} GiB of memory and {time}"


def estimate(onnx_bytes: int, *, streamed: bool, timed: bool) -> Estimate:
    """``streamed``: the plan goes to disk as it is made. ``timed``: kernels are timed on a GPU."""
    memory = _BASE_BYTES + (2 if streamed else 3) * onnx_bytes
    return Estimate(memory, None if timed else _BASE_SECONDS + _SECONDS_PER_BYTE * onnx_bytes)


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
    """Of version 2 control groups; nothing where there is no limit."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
        return None if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, StopIteration, ValueError):
        return None
