"""CUDA memory: buffers, views of them, and blocks that are used again once the copies on them are done."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import Buffer
from tstitch_engines.spec import itemsize, storage_dtype

__all__ = ["Block", "Blocks", "CudaBuffer", "CudaDownload", "host_view"]


class CudaBuffer:
    """Device memory with a shape. ``owner`` is what keeps the memory: an allocation, a block, someone else's array."""

    def __init__(self, owner: Any, ptr: int, shape: tuple[int, ...], dtype: str) -> None:
        self.owner = owner
        self.ptr = ptr
        self.shape = shape
        self.dtype = dtype
        self.nbytes = math.prod(shape) * itemsize(dtype)


class Block:
    """``nbytes`` of memory and the event after which they may be used again."""

    def __init__(self, memory: Any, nbytes: int) -> None:
        self._memory = memory
        self.nbytes = nbytes
        self.ptr = int(memory.handle)
        self.busy_until: Any = None


class Blocks:
    """Blocks in flight. ``take`` never waits: when all are still in use it makes another one with ``allocate``.

    A thread that waits for a download gives its block back while another enqueues the next one.
    """

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self._allocate = allocate
        self._blocks: list[Block] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Block:
        """A block of at least ``nbytes`` that nothing uses; ``give`` it back after enqueuing its last use."""
        with self._lock:
            for index, block in enumerate(self._blocks):
                if block.nbytes >= nbytes and block.busy_until.is_done:
                    return self._blocks.pop(index)
        size = 1 << max(16, (nbytes - 1).bit_length())
        return Block(self._allocate(size), size)

    def give(self, block: Block, busy_until: Any) -> None:
        """``busy_until``: the event recorded after the block's last use."""
        block.busy_until = busy_until
        with self._lock:
            self._blocks.append(block)
            self._blocks.sort(key=lambda one: one.nbytes)  # so that `take` picks the smallest that fits


class CudaDownload:
    """A copy on its way into page-locked memory, there once the event ``done`` is; ``received`` takes that back."""

    def __init__(self, block: Block, like: Buffer, done: Any, received: Callable[[Block, Any], None]) -> None:
        self._block = block
        self._like = like
        self._done = done
        self._received = received

    def get(self) -> NDArray[Any]:
        self._done.sync()
        copy = host_view(self._block, self._like).copy()
        self._received(self._block, self._done)
        return copy


def host_view(block: Block, like: Buffer) -> NDArray[Any]:
    """A page-locked block's memory as an array of ``like``'s shape and storage dtype."""
    raw = (ctypes.c_uint8 * like.nbytes).from_address(block.ptr)
    return np.ctypeslib.as_array(raw).view(storage_dtype(like.dtype)).reshape(like.shape)
