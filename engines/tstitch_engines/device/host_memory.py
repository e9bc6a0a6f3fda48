"""Buffers in host memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.child import free_memory, show_size
from tstitch_engines.device.base import ALIGNMENT
from tstitch_engines.errors import OutOfMemory
from tstitch_engines.spec import storage_dtype

__all__ = ["HostBuffer"]


class HostBuffer:
    """Host memory, aligned; ``array`` is the numpy view of it (``uint16`` bits for bfloat16) and keeps it alive."""

    def __init__(self, shape: tuple[int, ...], dtype: str, array: NDArray[Any] | None = None) -> None:
        """Allocates, unless an ``array`` of that shape and storage dtype is given. Raises ``OutOfMemory``."""
        if array is None:
            stored = storage_dtype(dtype)
            nbytes = math.prod(shape) * stored.itemsize
            try:
                raw = np.empty(nbytes + ALIGNMENT, np.uint8)
            except (MemoryError, ValueError, OverflowError):  # the last two: more than there are addresses
                free = free_memory()
                have = "" if free is None else f", of {show_size(free)} free"
                raise OutOfMemory(
                    f"the host has no room for {dtype}{list(shape)}: {show_size(nbytes)}{have}",
                    hint="build engines for smaller batches and sizes: tstitch-trt build BUNDLE --batch 1:1:2",
                ) from None
            offset = -raw.ctypes.data % ALIGNMENT
            array = raw[offset : offset + nbytes].view(stored).reshape(shape)
        self.array = array
        self.dtype = dtype
        self.shape = shape
        self.ptr: int = array.ctypes.data
        self.nbytes: int = array.nbytes
