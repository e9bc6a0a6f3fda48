"""Streams and events of cuda.core whose errors are ours, and memory that is given back in a stream's order.

Not run on a GPU (see ``cuda``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from tstitch_engines.device.cuda_errors import attempt, check

__all__ = ["CudaEvent", "CudaMemory", "CudaStream", "StreamHandle", "kept_device"]


class CudaEvent:
    """A point in a stream's work. Any thread may wait for it."""

    def __init__(self, stream: CudaStream, core: Any) -> None:
        self._stream = stream
        self.core = core

    @property
    def is_done(self) -> bool:
        return attempt(f"{self._stream.name}: work on the device failed", lambda: bool(self.core.is_done))

    def sync(self) -> None:
        with self._stream.visited():
            attempt(f"{self._stream.name}: work on the device failed", self.core.sync)

    def __sub__(self, other: CudaEvent) -> float:
        """Milliseconds between two events with timing."""
        with self._stream.visited():
            return attempt(f"{self._stream.name}: no time was taken", lambda: float(self.core - other.core))


class CudaStream:
    """One stream of the device ``name``. ``core`` and ``device``: cuda.core's."""

    def __init__(self, core: Any, device: Any, runtime: Any, name: str) -> None:
        self.core = core
        self.name = name
        self.handle = int(core.handle)
        self._device = device
        self._runtime = runtime
        self._lock = threading.RLock()  # the collector may free memory in the middle of what holds it
        self._recorder = threading.RLock()
        self._recording = False
        self._late: list[tuple[Any, Sequence[int]]] = []

    def activate(self) -> None:
        """Makes the primary context, that of TensorRT, ONNX Runtime and torch, the calling thread's current one."""
        attempt(f"{self.name}: it can't be used", self._device.set_current)

    def record(self, options: Any = None) -> CudaEvent:
        """An event after the work enqueued so far."""
        return CudaEvent(self, attempt(f"{self.name}: an event was refused", self.core.record, options=options))

    def wait(self, event: CudaEvent) -> None:
        """Work enqueued from here on comes after the event. Does not wait on the host."""
        attempt(f"{self.name}: a wait was refused", self.core.wait, event.core)

    def sync(self) -> None:
        """Waits until all work on it is done. From any thread, as ``CudaEvent.sync``."""
        with self.visited():
            attempt(f"{self.name}: work on the device failed", self.core.sync)

    def copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        """``kind``: the end of the name of a ``cudaMemcpyKind``, e.g. ``HostToDevice``."""
        copied = getattr(self._runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
        result = self._runtime.cudaMemcpyAsync(target, source, nbytes, copied, self.handle)
        check(f"{self.name}: a copy failed", self._runtime, result)

    # --- memory

    def free(self, memory: Any, readers: Sequence[int]) -> None:
        """Gives memory back after the work enqueued here so far, and on the streams ``readers``. For finalisers.

        What comes while this stream is recorded, from whatever thread, waits for the end of the recording, of which it
        would become a part.
        """
        with self._lock:  # until it is freed: no recording begins in between
            if self._recording:
                self._late.append((memory, readers))
                return
            if readers:
                with suppress(Exception), self.visited(finaliser=True):  # of a lost device nothing can be waited for
                    for handle in readers:
                        self.core.wait(StreamHandle(handle))
            memory.close()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A block that begins and ends a recording of this stream."""
        with self._recorder:
            with self._lock:
                self._recording = True
            try:
                yield
            finally:
                with self._lock:
                    self._recording = False
                    late, self._late = self._late, []
                for memory, readers in late:
                    self.free(memory, readers)

    def unrecorded(self) -> AbstractContextManager[object]:
        """A block in which no other thread records this stream: for what orders it after work of others.

        CUDA refuses that in a recording, which it breaks (cudaErrorStreamCaptureIsolation).
        """
        return self._recorder

    @contextmanager
    def visited(self, *, finaliser: bool = False) -> Iterator[None]:
        """A block in which the device is the thread's current one, on whatever thread; see ``kept_device``."""
        with kept_device(finaliser=finaliser):
            self.activate()
            yield


@contextmanager
def kept_device(*, finaliser: bool = False) -> Iterator[None]:
    """A block after which the calling thread's current device is what it was before.

    Where it had none it keeps what it got: what is freed later wants one. But not in a ``finaliser``, which may be run
    in the middle of anything.
    """
    before = None
    with suppress(ImportError, RuntimeError):  # without a driver there is none, and whoever wants one says so
        from cuda.bindings import driver

        before = driver.cuCtxGetCurrent()[1]
    try:
        yield
    finally:
        if before is not None and (int(before) or finaliser):
            driver.cuCtxSetCurrent(before)


class CudaMemory:
    """An allocation in a stream's order, which it is also given back in.

    ``readers``: streams of other libraries that were handed the memory, as integers; it is given back after their work.
    """

    def __init__(self, core: Any, stream: CudaStream) -> None:
        self._core = core
        self._stream = stream
        self.handle = int(core.handle)
        self.readers: list[int] = []

    def __del__(self) -> None:
        self._stream.free(self._core, self.readers)


class StreamHandle:
    """A ``cudaStream_t`` as cuda.core takes streams of others."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle
