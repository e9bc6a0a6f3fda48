"""The CPU as a device: memory is numpy's, and every call is finished when it returns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import ArenaBuffers, Buffer, Download, Graph, NotCaptured, StepKernels, Stopwatch
from tstitch_engines.device.host_kernels import HostStepKernels, fill_initial_noise, gather_rows
from tstitch_engines.device.host_memory import HostBuffer
from tstitch_engines.errors import BadInput
from tstitch_engines.spec import itemsize, storage_dtype

__all__ = ["HostDevice"]


class HostDevice:
    name = "cpu"
    graphs = False

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def activate(self) -> None:
        return

    def kept(self) -> AbstractContextManager[None]:
        return nullcontext()

    def with_own_stream(self) -> HostDevice:
        return self

    def empty(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        self.calls["alloc"] += 1
        return HostBuffer(shape, dtype)

    def view(self, block: Buffer, offset: int, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        nbytes = math.prod(shape) * itemsize(dtype)
        raw = _host(block).reshape(-1).view(np.uint8)
        assert offset + nbytes <= len(raw), "the view ends outside its block"
        return HostBuffer(shape, dtype, raw[offset : offset + nbytes].view(storage_dtype(dtype)).reshape(shape))

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        self.calls["upload"] += 1
        _host(target)[...] = source

    def download(self, source: Buffer) -> NDArray[Any]:
        self.calls["download"] += 1
        return _host(source).copy()

    def download_later(self, source: Buffer) -> Download:
        return _HostDownload(self.download(source))

    def copy(self, target: Buffer, source: Buffer) -> None:
        self.calls["copy"] += 1
        _host(target)[...] = _host(source)

    def borrow(self, array: Any) -> Buffer | None:
        """Host arrays only: always ``None``, or ``BadInput``."""
        place = array.__dlpack_device__()[0] if hasattr(array, "__dlpack_device__") else 1
        if place not in (1, 3) or hasattr(array, "__cuda_array_interface__"):  # DLPack: 1 is the CPU, 3 pinned memory
            raise BadInput(
                f"a {type(array).__name__} in GPU memory was given to a runtime on cpu",
                hint="load with device='cuda', or pass a host copy (in torch: tensor.cpu())",
            )
        return None

    def share(self, buffer: Buffer) -> NDArray[Any]:
        return _host(buffer)

    def synchronize(self) -> None:
        self.calls["sync"] += 1

    def lost(self) -> str | None:
        return None

    def capture(self, work: Callable[[], None], *, uploads: bool = False) -> Graph:
        raise NotCaptured("the CPU has no graphs", hint="nothing to do: calls cost little there")

    def step_kernels(self, arena: ArenaBuffers, shape: tuple[int, ...] | None = None) -> StepKernels:
        return HostStepKernels(arena, shape)

    def gather_rows(self, active: Buffer, source: Buffer, target: Buffer) -> None:
        gather_rows(active, source, target)

    def initial_noise(self, latents: Buffer, slot: int, seed: int, scale: float) -> None:
        fill_initial_noise(_host(latents)[slot], seed, scale)

    def scaled_copy(self, target: Buffer, source: Buffer, scale: float) -> None:
        self.calls["copy"] += 1
        np.multiply(_host(source), np.float32(scale), out=_host(target))

    def stopwatch(self) -> Stopwatch:
        return _HostStopwatch()


class _HostDownload(NamedTuple):
    array: NDArray[Any]

    def get(self) -> NDArray[Any]:
        return self.array


class _HostStopwatch:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(perf_counter())

    def milliseconds(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def _host(buffer: Buffer) -> NDArray[Any]:
    assert isinstance(buffer, HostBuffer), "a buffer of another device reached the host device"
    return buffer.array
