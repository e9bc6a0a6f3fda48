"""The CUDA device through cuda.core: memory, streams, copies, events, graphs. No torch.

Not run on a GPU: tests run it over a stand-in for CUDA (``tests/support/cuda_stand_in``).

Ownership: a ``CudaDevice`` owns its streams; a buffer from ``empty`` owns its memory, which is freed in stream order
when it and all views of it are dropped. A CUDA graph or an engine that knows a buffer's address does not keep it alive:
its owner must.

Threads: CUDA has a current device for each thread, and this one is current after it was made and after ``activate``,
which whoever enters from outside calls first: another thread, or the same one after it used another device. What waits
(``synchronize``, ``Download.get``, ``Stopwatch.milliseconds``, ``lost``) and ``free_memory`` do so themselves, and
finalisers leave a thread's current device as it was. One thread at a time.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import ALIGNMENT, ArenaBuffers, Buffer, StepKernels, Stopwatch
from tstitch_engines.device.cuda_errors import attempt, check
from tstitch_engines.device.cuda_graph import CudaGraph, capture
from tstitch_engines.device.cuda_interop import CudaArray, borrow, foreign_stream
from tstitch_engines.device.cuda_kernels import (
    CudaStepKernels,
    Launcher,
    enqueue_gather_rows,
    enqueue_initial_noise,
    enqueue_scaled_copy,
    load_module,
)
from tstitch_engines.device.cuda_memory import Blocks, CudaBuffer, CudaDownload, host_view
from tstitch_engines.device.cuda_stream import CudaEvent, CudaMemory, CudaStream, kept_device
from tstitch_engines.device.recording import RECORDING
from tstitch_engines.driver import DRIVERS, driver_version, fitting_cuda, fitting_extra
from tstitch_engines.errors import BadInput, FailedWork, OutOfMemory, Unavailable
from tstitch_engines.spec import itemsize, storage_dtype

__all__ = ["CudaDevice", "CudaStopwatch", "compute_capability", "cuda_bindings", "gpu_and_driver"]

OLDEST_ARCH: Final = (7, 5)  # engines/src/cuda.cmake compiles for nothing older
_INSUFFICIENT_DRIVER: Final = 35  # cudaErrorInsufficientDriver
BESIDE: Final = 1 << 16  # bytes from which on an upload is worth two events to keep it out of the work's way


class CudaDevice:
    """GPU ``index``. Raises ``Unavailable`` when it, its driver or cuda-core is missing.

    ``stream``: see ``open_device``. All work runs on that stream; a second one carries copies between host and device
    that need not hold it up. Events order the two.
    """

    graphs = True

    def __init__(self, index: int = 0, *, stream: Any = None) -> None:
        runtime = cuda_bindings(index)
        from cuda.core import Device, LegacyPinnedMemoryResource, StreamOptions

        self.name = f"cuda:{index}"
        self.index = index
        self.calls: Counter[str] = Counter()
        self._runtime = runtime
        self._device = attempt(f"{self.name}: it can't be used", Device, index)
        attempt(f"{self.name}: it can't be used", self._device.set_current)
        self.arch: tuple[int, int] = tuple(self._device.compute_capability)
        if self.arch < OLDEST_ARCH:
            raise Unavailable(
                f"{self.name} ({self._device.name}) has compute capability {_dotted(self.arch)}; "
                f"allowed is {_dotted(OLDEST_ARCH)} (Turing) or newer",
                hint="use another GPU (--device cuda:N) or --device cpu",
            )
        # Non-blocking: work that some library puts on the legacy default stream can't stall a step.
        options = StreamOptions(nonblocking=True)
        made = {"options": options} if stream is None else {"obj": foreign_stream(stream)}
        self._stream, self._side = (
            CudaStream(
                attempt(f"{self.name}: no stream was made", self._device.create_stream, **how),
                *(self._device, runtime, self.name),
            )
            for how in (made, {"options": options})
        )
        what, pin, core = (
            f"{self.name}: no page-locked memory",
            LegacyPinnedMemoryResource().allocate,
            self._stream.core,
        )
        streams = (self._stream, self._side)
        this: CudaDevice = weakref.proxy(self)  # so that this object goes when it is dropped, in no need of a collector
        self._pinned = Blocks(lambda nbytes: attempt(what, pin, nbytes, stream=core), streams)
        self._bounces = Blocks(lambda nbytes: this._allocate(nbytes, "a block to copy through", this._side), streams)
        self._module: Any = None
        self._kernels: dict[str, Any] = {}

    @property
    def _launch(self) -> Launcher:
        return Launcher(self._stream.core, self.calls, self.kernel, self.empty)

    @property
    def stream_handle(self) -> int:
        """The ``cudaStream_t`` on which all work of this device object runs."""
        return self._stream.handle

    def activate(self) -> None:
        self._stream.activate()

    def kept(self) -> AbstractContextManager[None]:
        return kept_device()

    def with_own_stream(self) -> CudaDevice:
        """See ``Device``. Calls of both are counted together."""
        other = CudaDevice(self.index)
        other.calls = self.calls
        return other

    def empty(self, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        """See ``Device``. Raises ``OutOfMemory`` when the GPU's memory does not suffice."""
        memory = self._allocate(math.prod(shape) * itemsize(dtype), f"{dtype}{list(shape)}", self._stream)
        buffer = CudaBuffer(memory, int(memory.handle), shape, dtype)
        assert buffer.ptr % ALIGNMENT == 0, "CUDA's allocators align to 256 bytes"
        return buffer

    def _allocate(self, nbytes: int, what: str, stream: CudaStream) -> CudaMemory:
        self.calls["alloc"] += 1
        where = f"{self.name}: no memory for {what}"
        try:
            return CudaMemory(attempt(where, self._device.allocate, max(nbytes, 1), stream=stream.core), stream)
        except OutOfMemory as error:
            free = self.free_memory()
            raise OutOfMemory(
                f"{self.name} has no room for {what}: {nbytes / 2**20:.1f} MiB, of {free / 2**20:.1f} MiB free",
                hint=error.hint,
            ) from error

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody holds; what pools keep for later counts as held."""
        with self._stream.visited():
            found = self._runtime.cudaMemGetInfo()
        check(f"{self.name}: its memory can't be asked for", self._runtime, found)
        return int(found[1])

    def view(self, block: Buffer, offset: int, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        view = CudaBuffer(block, block.ptr + offset, shape, dtype)
        assert offset + view.nbytes <= block.nbytes, "the view ends outside its block"
        return view

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        """See ``Device``. Does not wait: the data goes through pinned memory of this device's own.

        Large data crosses the bus beside the work enqueued so far, into memory of its own, and is put in place after
        that work.
        """
        if source.shape != target.shape or source.dtype != storage_dtype(target.dtype):
            raise BadInput(
                f"can't upload {source.dtype}{list(source.shape)} into {target.dtype}{list(target.shape)}",
                hint="upload an array of the buffer's shape and storage dtype (bfloat16 travels as uint16)",
            )
        if target.nbytes == 0:
            return
        self.calls["upload"] += 1
        block = self._pinned.take(target.nbytes)
        host_view(block, target)[...] = source
        if target.nbytes < BESIDE:
            self._stream.copy(target.ptr, block.ptr, target.nbytes, "HostToDevice")
            self._pinned.give(block, self._stream.record())
            return
        bounce = self._bounces.take(target.nbytes)
        self._side.copy(bounce.ptr, block.ptr, target.nbytes, "HostToDevice")
        arrived = self._side.record()
        self._pinned.give(block, arrived)
        self._stream.wait(arrived)
        self._stream.copy(target.ptr, bounce.ptr, target.nbytes, "DeviceToDevice")
        self._bounces.give(bounce, self._stream.record())

    def download(self, source: Buffer) -> NDArray[Any]:
        if source.nbytes == 0:
            return np.empty(source.shape, storage_dtype(source.dtype))
        self.calls["download"] += 1
        block = self._pinned.take(source.nbytes)
        self._stream.copy(block.ptr, source.ptr, source.nbytes, "DeviceToHost")
        return CudaDownload(block, source, self._stream.record(), self._pinned, self._count).get()

    def download_later(self, source: Buffer) -> CudaDownload:
        """See ``Device``: a copy within the device in the order of the work, and one to the host beside it."""
        self.calls["download"] += 1
        block, bounce = self._pinned.take(source.nbytes), self._bounces.take(source.nbytes)
        if bounce.fresh:  # it was allocated just now, in the side stream's order
            self._stream.wait(self._side.record())
        self._stream.copy(bounce.ptr, source.ptr, source.nbytes, "DeviceToDevice")
        self._side.wait(self._stream.record())
        self._side.copy(block.ptr, bounce.ptr, source.nbytes, "DeviceToHost")
        done = self._side.record()
        self._bounces.give(bounce, done)
        return CudaDownload(block, source, done, self._pinned, self._count)

    def copy(self, target: Buffer, source: Buffer) -> None:
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        self.calls["copy"] += 1
        self._stream.copy(target.ptr, source.ptr, source.nbytes, "DeviceToDevice")

    def borrow(self, array: Any) -> CudaBuffer | None:
        with self._stream.unrecorded():  # a server's requests are made while its steps are recorded
            return borrow(array, device_index=self.index, stream=self.stream_handle)

    def share(self, buffer: Buffer) -> CudaArray:
        return CudaArray(buffer, self.index)

    def synchronize(self) -> None:
        self.calls["sync"] += 1
        self._stream.sync()
        self._side.sync()

    def lost(self) -> str | None:
        """See ``Device``: an error that is still there after it was asked for spoils the context for good.

        It waits for this object's streams, not for the device, which would break other threads' recordings.
        """
        try:
            with self._stream.visited():
                self._runtime.cudaGetLastError()
                for stream in (self._stream, self._side):
                    check(self.name, self._runtime, self._runtime.cudaStreamSynchronize(stream.handle))
        except FailedWork as error:
            return error.message
        return None

    def capture(self, work: Callable[[], None], *, uploads: bool = False) -> CudaGraph:
        before = self.calls.copy()
        try:
            with RECORDING, self._stream.recorded():
                return capture(self._runtime, self.stream_handle, work, self._count, uploads=uploads)
        finally:  # what was recorded was not called
            self.calls.clear()
            self.calls.update(before)
            self.calls["capture"] += 1

    def _count(self, kind: str) -> None:
        self.calls[kind] += 1

    def step_kernels(self, arena: ArenaBuffers, shape: tuple[int, ...] | None = None) -> StepKernels:
        return CudaStepKernels(self._launch, arena, shape)

    def gather_rows(self, active: Buffer, source: Buffer, target: Buffer) -> None:
        enqueue_gather_rows(self._launch, active, source, target)

    def initial_noise(self, latents: Buffer, slot: int, seed: int, scale: float) -> None:
        enqueue_initial_noise(self._launch, latents, slot, seed, scale)

    def scaled_copy(self, target: Buffer, source: Buffer, scale: float) -> None:
        enqueue_scaled_copy(self._launch, target, source, scale)

    def kernel(self, name: str) -> Any:
        """The step kernel called ``name``. Raises ``Unavailable`` when this build has none."""
        if name not in self._kernels:
            if self._module is None:
                self._module = load_module(self.arch)
            self._kernels[name] = attempt(
                f"{self.name}: the step kernels can't be loaded", self._module.get_kernel, name
            )
        return self._kernels[name]

    def stopwatch(self) -> Stopwatch:
        return CudaStopwatch(self._stream)


def cuda_bindings(index: int) -> Any:
    """``cuda.bindings.runtime``, once GPU ``index`` is known to exist. Raises ``Unavailable`` with what is missing.

    The driver is asked through the runtime library first because without one cuda.core fails late and obscurely.
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import runtime
    except ImportError as error:
        raise Unavailable(
            f"cuda:{index} needs cuda-core, which can't be imported ({error})",
            hint=f'pip install "tstitch-trt[{fitting_extra("gpu")}]", or use --device cpu',
        ) from error
    code, count = runtime.cudaGetDeviceCount()
    if int(code) != 0:
        raise _no_cuda(runtime, index, code)
    if index >= count:
        names = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
        raise Unavailable(f"there is no GPU cuda:{index}; this machine has {names}", hint="use one of those, or cpu")
    return runtime


def _no_cuda(runtime: Any, index: int, code: Any) -> Unavailable:
    """An old driver and none at all are the same error to CUDA; only the driver's version, 0 for none, tells."""
    text = runtime.cudaGetErrorString(code)[1].decode()
    hint = "tstitch-trt doctor tells more (nvidia-smi must list the GPU); or use --device cpu"
    has, wants = (int(get()[1]) for get in (runtime.cudaDriverGetVersion, runtime.cudaRuntimeGetVersion))
    if int(code) == _INSUFFICIENT_DRIVER and has == 0:
        text = "there is no NVIDIA driver"
        hint = "install the NVIDIA driver (nvidia-smi must list the GPU), or use --device cpu"
    elif int(code) == _INSUFFICIENT_DRIVER:
        text = f"the NVIDIA driver is for CUDA {_version(has)}, and cuda-bindings here wants {_version(wants)}"
        release = fitting_cuda((has // 1000, 0))
        first = DRIVERS.get(max(release, wants // 1000), max(DRIVERS.values()))
        hint = f"update the NVIDIA driver to {first} or newer"
        if release == has // 1000:
            hint += f", or pip install 'cuda-core[cu{release}]' in place of cu{wants // 1000}"
    return Unavailable(f"cuda:{index} can't be used: {text} (CUDA error {int(code)})", hint=hint)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def compute_capability(index: int) -> tuple[int, int]:
    """Of GPU ``index``, e.g. ``(9, 0)``. Raises ``Unavailable`` when there is no such GPU."""
    cuda_bindings(index)
    from cuda.core import Device

    major, minor = Device(index).compute_capability
    return int(major), int(minor)


def gpu_and_driver(index: int) -> tuple[str, str]:
    """The model of GPU ``index`` and its driver, e.g. ``NVIDIA H200`` and ``CUDA 13.0, 580.95.05``.

    The second number is left out where the kernel does not tell it. Raises ``Unavailable`` when there is no such GPU.
    """
    runtime = cuda_bindings(index)
    from cuda.core import Device

    driver = [f"CUDA {_version(int(runtime.cudaDriverGetVersion()[1]))}", driver_version()]
    return str(Device(index).name), ", ".join(filter(None, driver))


def _dotted(arch: tuple[int, int]) -> str:
    return f"{arch[0]}.{arch[1]}"


class CudaStopwatch:
    """``Stopwatch`` on one stream."""

    def __init__(self, stream: CudaStream) -> None:
        from cuda.core import EventOptions

        self._stream = stream
        self._options = EventOptions(timing_enabled=True)
        self._marks: list[CudaEvent] = []

    def mark(self) -> None:
        self._marks.append(self._stream.record(self._options))

    def milliseconds(self) -> list[float]:
        if self._marks:
            self._marks[-1].sync()
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]
