"""Buffers in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import ALIGNMENT
from tstitch_engines.spec import storage_dtype

__all__ = ["HostBuffer"]


class HostBuffer:
    """Host memory, aligned; ``array`` is the numpy view of it (``uint16`` bits for bfloat16) and keeps it alive."""

    def __init__(self, shape: tuple[int, ...], dtype: str, array: NDArray[Any] | None = None) -> None:
        """Allocates, unless an ``array`` of that shape and storage dtype is given."""
        if array is None:
            stored = storage_dtype(dtype)
            nbytes = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
            raw = np.empty(nbytes + ALIGNMENT, np.uint8)
            offset = -raw.ctypes.data % ALIGNMENT
            array = raw[offset : offset + nbytes].view(stored).reshape(shape)
        self.array = array
        self.dtype = dtype
        self.shape = shape
        self.ptr: int = array.ctypes.data
        self.nbytes: int = array.nbytes
