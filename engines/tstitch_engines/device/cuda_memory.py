"""CUDA memory: buffers, views of them, and blocks that are used again once the copies on them are done."""

from __future__ import annotations

import ctypes
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import Buffer
from tstitch_engines.device.cuda_stream import CudaEvent, CudaStream
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
    """``nbytes`` of memory and the event after which they may be used again, or freed.

    ``busy_until`` is ``None`` where that is not known: it was taken, and not given back yet.
    """

    def __init__(self, memory: Any, nbytes: int, streams: Sequence[CudaStream]) -> None:
        self._memory = memory
        self._streams = streams
        self.nbytes = nbytes
        self.ptr = int(memory.handle)
        self.fresh = True  # nothing has used it yet
        self.busy_until: CudaEvent | None = None

    def __del__(self) -> None:
        """Page-locked memory is freed at once, and the pool may give device memory to another stream: so it waits."""
        with (
            suppress(Exception),
            self._streams[0].visited(finaliser=True),
        ):  # of a lost device nothing can be waited for
            for last in self._streams if self.busy_until is None else [self.busy_until]:
                last.core.sync()


class Blocks:
    """Blocks in flight. ``take`` never waits: when all are still in use it makes another one with ``allocate``.

    A thread that waits for a download gives its block back while another enqueues the next one.
    """

    def __init__(self, allocate: Callable[[int], Any], streams: Sequence[CudaStream]) -> None:
        """``streams``: all that work on blocks."""
        self._allocate = allocate
        self._streams = streams
        self._blocks: list[Block] = []
        self._returned: deque[Block] = deque()  # the collector may give one back in the middle of `take`
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Block:
        """A block of at least ``nbytes`` that nothing uses; ``give`` it back after enqueuing its last use."""
        with self._lock:
            while self._returned:
                self._blocks.append(self._returned.popleft())
            self._blocks.sort(key=lambda one: one.nbytes)  # the smallest that fits
            for block in self._blocks:
                if block.nbytes >= nbytes and block.busy_until is not None and block.busy_until.is_done:
                    self._blocks.remove(block)
                    block.fresh, block.busy_until = False, None
                    return block
        size = 1 << max(16, (nbytes - 1).bit_length())
        return Block(self._allocate(size), size, self._streams)

    def give(self, block: Block, busy_until: CudaEvent) -> None:
        """``busy_until``: the event recorded after the block's last use."""
        block.busy_until = busy_until
        self._returned.append(block)


class CudaDownload:
    """A copy on its way into page-locked memory, there once the event ``done`` is.

    Whether it is read or not, the block goes back to ``blocks``, where it is not used again before.
    """

    def __init__(
        self, block: Block, like: Buffer, done: CudaEvent, blocks: Blocks, count: Callable[[str], None]
    ) -> None:
        self._block: Block | None = block
        self._like = like
        self._done = done
        self._blocks = blocks
        self._count = count

    def get(self) -> NDArray[Any]:
        assert self._block is not None, "a download is read once"
        self._done.sync()
        copy = host_view(self._block, self._like).copy()
        self._count("sync")
        self._give_back()
        return copy

    def _give_back(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            self._blocks.give(block, self._done)

    __del__ = _give_back


def host_view(block: Block, like: Buffer) -> NDArray[Any]:
    """A page-locked block's memory as an array of ``like``'s shape and storage dtype."""
    raw = (ctypes.c_uint8 * like.nbytes).from_address(block.ptr)
    return np.ctypeslib.as_array(raw).view(storage_dtype(like.dtype)).reshape(like.shape)
