"""The CUDA device through cuda.core: memory, one stream, copies, events. No torch.

Not run on a GPU: written on a machine that has none. What is tested is that each lack is named (no cuda-core, no
driver, no such device, a build without CUDA kernels) and that the kernels compile.

Ownership: a ``CudaDevice`` owns its stream; a ``CudaBuffer`` owns its memory, which is freed in stream order when it is
dropped. A CUDA graph or an engine that knows a buffer's address does not keep it alive: its owner must. The device's
primary context is current on the thread that made the ``CudaDevice``; another thread that uses it calls
``make_current`` once first.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device import Buffer, Stopwatch
from tstitch_engines.errors import BadInput, FailedWork, Unavailable
from tstitch_engines.spec import itemsize, storage_dtype

__all__ = ["CudaBuffer", "CudaDevice", "compute_capability", "cuda_bindings"]

OLDEST_ARCH = (7, 5)  # engines/src/cuda.cmake compiles for nothing older


class CudaBuffer:
    """Device memory, 256-byte aligned; freed in the order of the device's stream."""

    def __init__(self, memory: Any, shape: tuple[int, ...], dtype: str) -> None:
        self._memory = memory
        self.ptr = int(memory.handle)
        self.shape = shape
        self.dtype = dtype
        self.nbytes = math.prod(shape) * itemsize(dtype)
        assert self.ptr % 256 == 0, "CUDA's allocators align to 256 bytes"


class CudaDevice:
    """GPU ``index``. Raises ``Unavailable`` when it, its driver or cuda-core is missing."""

    def __init__(self, index: int = 0) -> None:
        runtime = cuda_bindings(index)
        from cuda.core import Device, LegacyPinnedMemoryResource, StreamOptions

        self.name = f"cuda:{index}"
        self._runtime = runtime
        self._device = Device(index)
        self._device.set_current()  # the primary context: the one that TensorRT, ONNX Runtime and torch use
        self.arch: tuple[int, int] = tuple(self._device.compute_capability)
        if self.arch < OLDEST_ARCH:
            raise Unavailable(
                f"{self.name} ({self._device.name}) has compute capability {_dotted(self.arch)}; "
                f"allowed is {_dotted(OLDEST_ARCH)} (Turing) or newer",
                hint="use another GPU (--device cuda:N) or --device cpu",
            )
        # Non-blocking: work that some library puts on the legacy default stream can't stall a step.
        self._stream = self._device.create_stream(options=StreamOptions(nonblocking=True))
        self._staging = _Staging(LegacyPinnedMemoryResource(), self._stream)
        self._module: Any = None

    @property
    def stream_handle(self) -> int:
        """The ``cudaStream_t`` on which all work of this device object runs."""
        return int(self._stream.handle)

    @property
    def stream(self) -> Any:
        """The ``cuda.core.Stream`` of ``stream_handle``."""
        return self._stream

    def make_current(self) -> None:
        """Makes the device's context current on the calling thread."""
        self._device.set_current()

    def empty(self, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        """See ``Device``. Raises ``FailedWork`` when the GPU's memory does not suffice."""
        nbytes = math.prod(shape) * itemsize(dtype)
        try:
            memory = self._device.allocate(max(nbytes, 1), stream=self._stream)
        except Exception as error:  # cuda.core's CUDAError is private and carries the CUDA name in its text only
            if "OUT_OF_MEMORY" not in str(error):
                raise
            raise FailedWork(
                f"{self.name} has no room for {dtype}{list(shape)} ({nbytes / 2**20:.1f} MiB)",
                hint="use a smaller batch, or free memory that other programs hold (nvidia-smi lists them)",
            ) from error
        return CudaBuffer(memory, shape, dtype)

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        """See ``Device``. Does not wait: the data goes through pinned memory of this device's own."""
        if source.shape != target.shape or source.dtype != storage_dtype(target.dtype):
            raise BadInput(
                f"can't upload {source.dtype}{list(source.shape)} into {target.dtype}{list(target.shape)}",
                hint="upload an array of the buffer's shape and storage dtype (bfloat16 travels as uint16)",
            )
        if target.nbytes == 0:
            return
        block = self._staging.take(target.nbytes)
        block.view(target)[...] = source
        self._check(
            self._runtime.cudaMemcpyAsync(
                target.ptr,
                block.ptr,
                target.nbytes,
                self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice,
                self.stream_handle,
            )
        )
        self._staging.give(block)

    def download(self, source: Buffer) -> NDArray[Any]:
        """A host copy of the buffer. Waits for all work enqueued before."""
        if source.nbytes == 0:
            return np.empty(source.shape, storage_dtype(source.dtype))
        block = self._staging.take(source.nbytes)
        self._check(
            self._runtime.cudaMemcpyAsync(
                block.ptr,
                source.ptr,
                source.nbytes,
                self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
                self.stream_handle,
            )
        )
        self._stream.sync()
        copy = block.view(source).copy()
        self._staging.give(block)
        return copy

    def synchronize(self) -> None:
        """Waits for all work enqueued before."""
        self._stream.sync()

    def step_kernels(
        self, *, latents: Buffer, history: Buffer, rows: Buffer, step: Buffer, seed: Buffer, fault: Buffer
    ) -> Any:
        from tstitch_engines.cuda_kernels import CudaStepKernels

        return CudaStepKernels(self, latents=latents, history=history, rows=rows, step=step, seed=seed, fault=fault)

    def initial_noise(self, latents: Buffer, slot: int, seed: int, scale: float) -> None:
        from tstitch_engines.cuda_kernels import enqueue_initial_noise

        enqueue_initial_noise(self, latents, slot, seed, scale)

    def kernel(self, name: str) -> Any:
        """The step kernel called ``name``. Raises ``Unavailable`` when this build has none."""
        if self._module is None:
            from tstitch_engines.cuda_kernels import load_module

            self._module = load_module()
        return self._module.get_kernel(name)

    def stopwatch(self) -> Stopwatch:
        return _CudaStopwatch(self._stream)

    def _check(self, result: tuple[Any, ...]) -> None:
        if int(result[0]) != 0:
            text = self._runtime.cudaGetErrorString(result[0])[1].decode()
            raise FailedWork(
                f"{self.name}: a copy failed: {text}", hint="run with CUDA_LAUNCH_BLOCKING=1 to find where"
            )


class _Block:
    """Page-locked host memory and the event after which it may be used again."""

    def __init__(self, memory: Any, nbytes: int) -> None:
        self._memory = memory
        self.nbytes = nbytes
        self.ptr = int(memory.handle)
        self.busy_until: Any = None

    def view(self, like: Buffer) -> NDArray[Any]:
        raw = (ctypes.c_uint8 * like.nbytes).from_address(self.ptr)
        return np.ctypeslib.as_array(raw).view(storage_dtype(like.dtype)).reshape(like.shape)


class _Staging:
    """Page-locked blocks in flight. ``take`` never waits: when all are still being copied it makes another one."""

    def __init__(self, resource: Any, stream: Any) -> None:
        self._resource = resource
        self._stream = stream
        self._blocks: list[_Block] = []

    def take(self, nbytes: int) -> _Block:
        """A block of at least ``nbytes`` that no copy is using; ``give`` it back after enqueuing the copy."""
        for index, block in enumerate(self._blocks):
            if block.nbytes >= nbytes and block.busy_until.is_done:
                return self._blocks.pop(index)
        size = 1 << max(16, (nbytes - 1).bit_length())
        return _Block(self._resource.allocate(size, stream=self._stream), size)

    def give(self, block: _Block) -> None:
        block.busy_until = self._stream.record()
        self._blocks.append(block)
        self._blocks.sort(key=lambda one: one.nbytes)  # so that `take` picks the smallest that fits


class _CudaStopwatch:
    def __init__(self, stream: Any) -> None:
        from cuda.core import EventOptions

        self._stream = stream
        self._options = EventOptions(timing_enabled=True)
        self._marks: list[Any] = []

    def mark(self) -> None:
        self._marks.append(self._stream.record(options=self._options))

    def milliseconds(self) -> list[float]:
        if self._marks:
            self._marks[-1].sync()
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


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
            hint='pip install "tstitch-trt[gpu]", or use --device cpu',
        ) from error
    code, count = runtime.cudaGetDeviceCount()
    if int(code) != 0:
        text = runtime.cudaGetErrorString(code)[1].decode()
        raise Unavailable(
            f"cuda:{index} can't be used: {text} (CUDA error {int(code)})",
            hint="install the NVIDIA driver (nvidia-smi must list the GPU), or use --device cpu",
        )
    if index >= count:
        names = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
        raise Unavailable(f"there is no GPU cuda:{index}; this machine has {names}", hint="use one of those, or cpu")
    return runtime


def compute_capability(index: int) -> tuple[int, int]:
    """Of GPU ``index``, e.g. ``(9, 0)``. Raises ``Unavailable`` when there is no such GPU."""
    cuda_bindings(index)
    from cuda.core import Device

    major, minor = Device(index).compute_capability
    return int(major), int(minor)


def _dotted(arch: tuple[int, int]) -> str:
    return f"{arch[0]}.{arch[1]}"
