"""Where memory lives and work runs: the few verbs the runtime needs, on the host and on CUDA."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import unknown_name
from tstitch_engines.spec import storage_dtype

__all__ = ["Buffer", "Device", "HostDevice", "StepKernels", "open_device", "parse_device"]


class Buffer(Protocol):
    """Owned, contiguous device memory with a shape; ``ptr`` stays the same for its whole life."""

    @property
    def ptr(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


class StepKernels(Protocol):
    """``prepare`` and ``advance`` over one arena of lanes (see ``rows`` for the arithmetic).

    Neither synchronises or allocates. ``active`` holds the arena slots of the lanes of this batch, int32 ``[B]``.
    """

    def prepare(self, active: Buffer, sample: Buffer, timestep: Buffer, *, guided: bool) -> None:
        """Writes ``C_IN x`` into ``sample [B or 2B, C, H, W]`` and ``T`` into ``timestep [B or 2B]``.

        When ``guided`` both halves get the same values: first the conditional lanes, then the unconditional ones.
        """

    def advance(self, active: Buffer, model_output: Buffer, *, guided: bool, rescale: bool) -> None:
        """Applies each lane's current row to ``model_output [B or 2B, C or 2C, H, W]`` and moves on by one step.

        ``rescale`` says whether any active row has a nonzero ``RESCALE`` (it needs a reduction of its own).
        """


class Device(Protocol):
    """One place to run. Methods that wait for the device say so; all others return at once."""

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda:N``."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocates; the contents are undefined."""

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        """Copies host data into a buffer of the same shape. On CUDA the source may be reused at once (staged)."""

    def download(self, source: Buffer) -> NDArray[Any]:
        """A host copy of the buffer. Waits for the device's work on it."""

    def synchronize(self) -> None:
        """Waits until all work enqueued by this device object is done."""

    def step_kernels(
        self, *, latents: Buffer, history: Buffer, rows: Buffer, step: Buffer, seed: Buffer, fault: Buffer
    ) -> StepKernels:
        """The step kernels over an arena of ``L`` lanes of ``C*H*W`` elements and tables of ``N`` rows.

        ``latents`` float32 ``[L,C,H,W]``; ``history`` float32 ``[2,L,C,H,W]``; ``rows`` float32 ``[L,N,16]``;
        ``step`` int32 ``[L]``; ``seed`` int64 ``[L]`` (bits of a uint64); ``fault`` int32 ``[L]``: -1, or the step at
        which a lane's latent first was not finite.
        """

    def initial_noise(self, latents: Buffer, slot: int, seed: int, scale: float) -> None:
        """Writes ``scale * z`` into one lane's latent, ``z`` from Philox keyed by ``seed`` at the initial step."""

    def stopwatch(self) -> Stopwatch:
        """Marks points of the device's work queue and tells the milliseconds between them."""


class Stopwatch(Protocol):
    def mark(self) -> None:
        """Notes a point in the work queue. Does not wait."""

    def milliseconds(self) -> list[float]:
        """Times between consecutive marks. Waits for the last mark."""


class HostBuffer:
    """Host memory, 64-byte aligned; ``array`` is the numpy view of it (``uint16`` bits for bfloat16)."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        stored = storage_dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.empty(count * stored.itemsize + 64, np.uint8)
        offset = -raw.ctypes.data % 64
        self.array: NDArray[Any] = raw[offset : offset + count * stored.itemsize].view(stored).reshape(shape)
        self.dtype = dtype
        self.shape = shape
        self.ptr = self.array.ctypes.data
        self.nbytes = self.array.nbytes


class HostDevice:
    """The CPU: every call is finished when it returns."""

    name = "cpu"

    def empty(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(shape, dtype)

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        _host(target)[...] = source

    def download(self, source: Buffer) -> NDArray[Any]:
        return _host(source).copy()

    def synchronize(self) -> None:
        return

    def step_kernels(
        self, *, latents: Buffer, history: Buffer, rows: Buffer, step: Buffer, seed: Buffer, fault: Buffer
    ) -> StepKernels:
        from tstitch_engines.host_kernels import HostStepKernels

        return HostStepKernels(
            latents=_host(latents),
            history=_host(history),
            rows=_host(rows),
            step=_host(step),
            seed=_host(seed),
            fault=_host(fault),
        )

    def initial_noise(self, latents: Buffer, slot: int, seed: int, scale: float) -> None:
        from tstitch_engines.host_kernels import fill_initial_noise

        fill_initial_noise(_host(latents)[slot], seed, scale)

    def stopwatch(self) -> Stopwatch:
        return _HostStopwatch()


class _HostStopwatch:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        from time import perf_counter

        self._marks.append(perf_counter())

    def milliseconds(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def _host(buffer: Buffer) -> NDArray[Any]:
    assert isinstance(buffer, HostBuffer), "a buffer of another device reached the host device"
    return buffer.array


def parse_device(text: str) -> tuple[str, int]:
    """``"cpu"`` -> ``("cpu", 0)``; ``"cuda"`` and ``"cuda:1"`` likewise. Raises ``UnknownName``."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise unknown_name("device", text, ["cpu", "cuda", "cuda:N"])
    return kind, int(index or 0)


def open_device(text: str) -> Device:
    """The device called ``text``. Raises ``Unavailable`` when there is no such GPU or cuda-core is not installed."""
    kind, index = parse_device(text)
    if kind == "cpu":
        return HostDevice()
    from tstitch_engines.cuda_device import CudaDevice

    return CudaDevice(index)
