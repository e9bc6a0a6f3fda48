"""The memory and time that a compilation will take.

Measured with TensorRT-RTX 1.7 on two CPU cores, the plan written as a stream (peak resident memory, seconds), ONNX of
    2 to 30 MB      0.6 to 1.2 GB     0.3 to 6 s
    1.5 GB          4.0 GB            15 s
    2.4 GB          5.2 GB            4 s (files in the page cache) to 13 s
``1 GB + 2 x ONNX`` and ``3 s + 8 s per GB`` cover that; without the stream the plan is in memory once more (7.4 GB for
2.4 GB). TensorRT times kernels on the GPU: its time is taken from earlier builds in the cache, else unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final, NamedTuple

from tstitch_engines.bundle.cache import Stored

__all__ = ["Build", "Estimate", "estimate", "recorded"]

_BASE_BYTES: Final = 1 << 30
_BASE_SECONDS: Final = 3.0
_SECONDS_PER_BYTE: Final = 8.0 / 1e9


class Build(NamedTuple):
    """A compilation that was measured."""

    onnx_sha256: str
    onnx_bytes: int
    seconds: float


class Estimate(NamedTuple):
    """``seconds`` is ``None`` where nothing is known; ``source`` says where they come from, or why not."""

    memory: int
    seconds: float | None
    source: str

    def __str__(self) -> str:
        time = "unknown time" if self.seconds is None else f"{self.seconds:.0f} s"
        return f"about {self.memory / 2**30:.1f} GiB of memory and {time} ({self.source})"


def recorded(entries: Sequence[Stored], *, backend: str, arch: str) -> list[Build]:
    """What the cache knows of compilations of this backend for this architecture."""
    found = []
    for entry in entries:
        info = entry.info
        if (info.get("backend"), info.get("arch")) == (backend, arch):
            values = (info.get("onnx_sha256"), info.get("onnx_bytes"), info.get("seconds"))
            if isinstance(values[0], str) and isinstance(values[1], int) and isinstance(values[2], float):
                found.append(Build(values[0], values[1], values[2]))
    return found


def estimate(
    onnx_bytes: int, *, streamed: bool, timed: bool, onnx_sha256: str = "", builds: Sequence[Build] = ()
) -> Estimate:
    """``streamed``: the plan goes to disk as it is made. ``timed``: kernels are timed on a GPU.

    ``builds``: earlier ones of the same backend and architecture. Those of the same ONNX count alone (other options
    or profile); of others the time per byte, which is no more than a guess.
    """
    memory = _BASE_BYTES + (2 if streamed else 3) * onnx_bytes
    same = [build.seconds for build in builds if build.onnx_sha256 == onnx_sha256]
    if same:
        times = "once" if len(same) == 1 else f"{len(same)} times"
        return Estimate(memory, median(same), f"measured here on the same ONNX, {times}")
    if not timed:
        return Estimate(memory, _BASE_SECONDS + _SECONDS_PER_BYTE * onnx_bytes, "by the size of the ONNX")
    if not builds:
        return Estimate(memory, None, "the cache has no earlier build of this backend for this GPU to go by")
    per_byte = median(build.seconds / max(build.onnx_bytes, 1) for build in builds)
    return Estimate(
        memory, per_byte * onnx_bytes, f"a guess from {len(builds)} other models compiled here, by their size"
    )
