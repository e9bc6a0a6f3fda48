"""One allocation cut into aligned slices, so that addresses are fixed and memory is asked for once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

from tstitch_engines.device.base import ALIGNMENT, Buffer, Device
from tstitch_engines.spec import itemsize

__all__ = ["Slab", "slab_bytes"]


def slab_bytes(sizes: Mapping[str, int]) -> int:
    """What a slab of these slices takes."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())


class Slab:
    """Named slices of one device buffer. Each is as large as its largest use and may be looked at in smaller shapes."""

    def __init__(self, device: Device, sizes: Mapping[str, int]) -> None:
        """``sizes``: bytes of each slice by name."""
        self._device = device
        self._sizes = dict(sizes)
        ends = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())]
        self._offsets = dict(zip(sizes, ends, strict=False))
        self.block = device.empty((slab_bytes(sizes),), "uint8")

    def view(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """The start of slice ``name`` as a buffer. All views of a slice have the same address."""
        assert math.prod(shape) * itemsize(dtype) <= self._sizes[name], f"the slice {name!r} is too small"
        return self._device.view(self.block, self._offsets[name], shape, dtype)

    @property
    def nbytes(self) -> int:
        return self.block.nbytes
