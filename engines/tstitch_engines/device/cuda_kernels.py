"""The step kernels on CUDA: launches of ``step_kernels.fatbin``, compiled from ``engines/src/cuda_driver.cu``.

Not run on a GPU (see ``cuda``). All launches go to the device's stream; nothing here waits, and after
construction nothing allocates device memory, so ``prepare`` and ``advance`` can be captured into a CUDA graph.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tstitch_engines.device.base import ArenaBuffers, Buffer
from tstitch_engines.device.cuda_errors import attempt
from tstitch_engines.device.fatbin import image_for
from tstitch_engines.device.step_row import HISTORY, ROW_FIELDS
from tstitch_engines.driver import driver_cuda, fitting_extra
from tstitch_engines.errors import BadInput, Unavailable

__all__ = [
    "CudaStepKernels",
    "Launcher",
    "enqueue_gather_rows",
    "enqueue_initial_noise",
    "enqueue_scaled_copy",
    "fatbin_path",
    "find_fatbin",
    "load_module",
]

THREADS = 256  # per block of the elementwise kernels; each thread takes four elements
MOMENT_THREADS = 512  # per block of guidance_factor, as in cuda_driver.cu
CURRENT_BYTES = 112  # of a position's step, which prepare notes for the kernels after it: Current in cuda_driver.cu

_MODEL_DTYPES = ("float32", "float16", "bfloat16")
_TIMESTEP_DTYPES = ("float32", "int64")


def fatbin_path() -> Path:
    """Where the build installs the fat binary: beside the extension module. It is there if nvcc or NVRTC was found."""
    from tstitch_engines import _kernels

    return Path(str(_kernels.__file__)).with_name("step_kernels.fatbin")


def find_fatbin() -> Path:
    """The fat binary of the build, else that of ``make_fatbin``. Raises ``Unavailable`` when there is none."""
    from tstitch_engines.make_fatbin import cached_fatbin

    if (path := fatbin_path()).is_file() or (path := cached_fatbin()).is_file():
        return path
    raise Unavailable(
        "this build of tstitch-trt has no CUDA step kernels: it was made with neither nvcc nor NVRTC",
        hint=f'pip install "tstitch-trt[{fitting_extra("gpu")}]" && python -m tstitch_engines.make_fatbin, which puts '
        "them into a cache",
    )


def load_module(capability: tuple[int, int]) -> Any:
    """The fat binary as a ``cuda.core.ObjectCode``; never print it: its repr asks the driver. Needs a driver.

    Raises ``Unavailable`` when there is none, or none for a GPU of ``capability`` and this driver.
    """
    path = find_fatbin()
    image_for(path, capability, driver_cuda())
    from cuda.core import ObjectCode

    return ObjectCode.from_fatbin(path.read_bytes(), name="step_kernels")


@dataclass(frozen=True)
class Launcher:
    """Puts step kernels into one stream and counts them in ``calls``."""

    stream: Any
    calls: Counter[str]
    kernel: Callable[[str], Any]
    empty: Callable[[tuple[int, ...], str], Buffer]

    def __call__(self, name: str, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        """Python integers go as 8-byte pointers, numpy scalars as what they are."""
        from cuda.core import LaunchConfig, launch

        self.calls["launch"] += 1
        config = LaunchConfig(grid=(*grid, 1), block=(threads, 1, 1))
        attempt(f"the kernel {name} could not be started", launch, self.stream, config, self.kernel(name), *arguments)


class CudaStepKernels:
    """``StepKernels`` on the buffers of one arena, which it keeps alive. An arena is used by one thread at a time."""

    def __init__(self, launch: Launcher, arena: ArenaBuffers, shape: tuple[int, ...] | None = None) -> None:
        lanes, *largest = arena.latents.shape
        self._shape = shape = tuple(largest) if shape is None else shape
        stride, elements = math.prod(largest), math.prod(shape)
        if shape[:1] != tuple(largest[:1]) or not 0 < elements <= stride:
            raise BadInput(
                f"latents {list(shape)} do not fit into an arena of latents {largest}",
                hint="ask for the arena's channels and at most its size",
            )
        if 2 * stride >= 2**31:
            raise BadInput(
                f"a lane of {stride} elements is too large; allowed is less than {2**30}",
                hint="use smaller latents or fewer frames",
            )
        like = ("float32", arena.latents.shape)
        wanted = {
            "latents": like,
            "history": ("float32", (HISTORY, *arena.latents.shape)),
            "rows": ("float32", (lanes, *arena.rows.shape[1:2], len(ROW_FIELDS))),
            "step": ("int32", (lanes,)),
            "seed": ("int64", (lanes,)),
            "fault": ("int32", (lanes,)),
            "y": like,
            "image": like,
            "mask": ("float32", (lanes, 1, *largest[1:])),
            "noise": like,
        }
        for name, buffer in arena.items():
            dtype, size = wanted[name]
            _require(name, buffer, (dtype,), size)
        self._launch = launch
        self._arena = arena
        self._lanes = lanes
        self._row_count = np.int32(arena.rows.shape[1])
        self._elements, self._stride = np.int32(elements), np.int32(stride)
        self._spatial = np.int32(elements // shape[0])
        # For each position in the batch: its step and row, and its factor for the rescale.
        self._current = launch.empty((lanes, CURRENT_BYTES), "uint8")
        self._factors = launch.empty((lanes,), "float32")
        self._blocks = -(-elements // (4 * THREADS))

    def prepare(self, active: Buffer, sample: Buffer, timestep: Buffer, *, guided: bool) -> None:
        """See ``StepKernels``. Enqueues one kernel."""
        batch = self._batch(active)
        total = 2 * batch if guided else batch
        _require("sample", sample, _MODEL_DTYPES, (total, *self._shape))
        _require("timestep", timestep, _TIMESTEP_DTYPES, (total,))
        arena = self._arena
        self._launch(
            f"prepare_{sample.dtype}_{timestep.dtype}", (self._blocks, batch), THREADS,
            arena.latents.ptr, arena.rows.ptr, arena.step.ptr, active.ptr, self._current.ptr, sample.ptr, timestep.ptr,
            self._row_count, self._elements, self._stride, np.int32(guided),
        )  # fmt: skip

    def advance(self, active: Buffer, model_output: Buffer, *, guided: bool, rescale: bool) -> None:
        """See ``StepKernels``. Enqueues one kernel, two with ``rescale``."""
        batch = self._batch(active)
        total = 2 * batch if guided else batch
        channels, *spatial = self._shape
        twice = model_output.shape[1:2] == (2 * channels,)
        _require("model_output", model_output, _MODEL_DTYPES, (total, (1 + twice) * channels, *spatial))
        arena, output_elements = self._arena, np.int32(int(self._elements) * (1 + twice))
        rescaled = guided and rescale
        if rescaled:
            self._launch(
                f"guidance_factor_{model_output.dtype}", (batch, 1), MOMENT_THREADS,
                self._current.ptr, model_output.ptr, self._factors.ptr,
                self._elements, self._spatial, output_elements,
            )  # fmt: skip
        optional = (arena.y, arena.image, arena.mask, arena.noise)
        self._launch(
            f"advance_{model_output.dtype}", (self._blocks, batch), THREADS,
            arena.latents.ptr, arena.history.ptr, self._current.ptr, arena.step.ptr, arena.seed.ptr, arena.fault.ptr,
            active.ptr, model_output.ptr, self._factors.ptr if rescaled else 0,
            *(0 if part is None else part.ptr for part in optional),
            np.int32(self._lanes), self._elements, self._stride, self._spatial, output_elements, np.int32(guided),
        )  # fmt: skip

    def _batch(self, active: Buffer) -> int:
        _require("active", active, ("int32",), active.shape[:1])
        if not 1 <= active.shape[0] <= self._lanes:
            raise BadInput(
                f"{active.shape[0]} active lanes; allowed is 1 to {self._lanes}, the lanes of the arena",
                hint="make the arena larger or the batch smaller",
            )
        return active.shape[0]


def enqueue_gather_rows(launch: Launcher, active: Buffer, source: Buffer, target: Buffer) -> None:
    """See ``Device.gather_rows``. Enqueues one kernel."""
    _require("active", active, ("int32",), active.shape[:1])
    batch, total = active.shape[0], target.shape[0]
    halves, lanes, pitch = source.shape
    row = target.nbytes // max(1, total)
    if batch == 0 or total % batch or not 1 <= total // batch <= halves or not 1 <= row <= pitch:
        raise BadInput(
            f"can't gather {total} rows of {row} bytes for {batch} active lanes from uint8{list(source.shape)}",
            hint="see Device.gather_rows for the shapes",
        )
    launch(
        "gather_rows", (-(-row // (16 * THREADS)), total), THREADS,
        active.ptr, source.ptr, target.ptr, np.int32(batch), np.int32(lanes), np.uint64(row), np.uint64(pitch),
    )  # fmt: skip


def enqueue_initial_noise(launch: Launcher, latents: Buffer, slot: int, seed: int, scale: float) -> None:
    """Writes ``scale * z`` into lane ``slot`` of ``latents``, in stream order."""
    elements = math.prod(latents.shape[1:])
    launch(
        "initial_noise", (-(-elements // (4 * THREADS)), 1), THREADS,
        latents.ptr + slot * elements * 4, np.uint64(seed & (2**64 - 1)), np.float32(scale), np.int32(elements),
    )  # fmt: skip


def enqueue_scaled_copy(launch: Launcher, target: Buffer, source: Buffer, scale: float) -> None:
    """``target = scale * source``, float32, in stream order."""
    _require("source", source, ("float32",), target.shape)
    _require("target", target, ("float32",), source.shape)
    elements = math.prod(target.shape)
    launch(
        "scaled_copy", (-(-elements // THREADS), 1), THREADS,
        target.ptr, source.ptr, np.float32(scale), np.uint64(elements),
    )  # fmt: skip


def _require(name: str, buffer: Buffer, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if buffer.dtype not in dtypes or buffer.shape != shape:
        raise BadInput(
            f"{name} is {buffer.dtype}{list(buffer.shape)}; allowed is {' or '.join(dtypes)} {list(shape)}",
            hint="give prepare and advance buffers of the shapes and dtypes that StepKernels documents",
        )
