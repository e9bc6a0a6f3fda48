"""The step kernels on CUDA: launches of ``step_kernels.fatbin``, compiled from ``engines/src/cuda_driver.cu``.

Not run on a GPU (see ``cuda_device``). All launches go to the device's stream; nothing here waits, and after
construction nothing allocates device memory, so ``prepare`` and ``advance`` can be captured into a CUDA graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tstitch_engines.device.base import Buffer
from tstitch_engines.device.step_row import HISTORY, ROW_FIELDS
from tstitch_engines.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from tstitch_engines.device.cuda import CudaDevice

__all__ = [
    "CudaStepKernels",
    "enqueue_initial_noise",
    "enqueue_scaled_copy",
    "fatbin_path",
    "find_fatbin",
    "load_module",
]

THREADS = 256  # per block of the elementwise kernels; each thread takes four elements
MOMENT_THREADS = 512  # per block of guidance_factor, as in cuda_driver.cu

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
        hint='pip install "tstitch-trt[gpu]" && python -m tstitch_engines.make_fatbin, which puts them into a cache',
    )


def load_module() -> Any:
    """The fat binary as a ``cuda.core.ObjectCode``; never print it: its repr asks the driver. Needs a driver."""
    path = find_fatbin()
    from cuda.core import ObjectCode

    return ObjectCode.from_fatbin(path.read_bytes(), name="step_kernels")


class CudaStepKernels:
    """``StepKernels`` on the buffers of one arena, which it keeps alive. An arena is used by one thread at a time."""

    def __init__(
        self,
        device: CudaDevice,
        *,
        latents: Buffer,
        history: Buffer,
        rows: Buffer,
        step: Buffer,
        seed: Buffer,
        fault: Buffer,
        y: Buffer | None = None,
        known: Buffer | None = None,
        mask: Buffer | None = None,
        noise: Buffer | None = None,
    ) -> None:
        lanes, channels = latents.shape[:2]
        self._elements = int(np.prod(latents.shape[1:]))
        self._spatial = self._elements // channels
        if 2 * self._elements >= 2**31:
            raise BadInput(
                f"a lane of {self._elements} elements is too large; allowed is less than {2**30}",
                hint="use smaller latents or fewer frames",
            )
        wanted = {
            "latents": (latents, "float32", latents.shape),
            "history": (history, "float32", (HISTORY, *latents.shape)),
            "rows": (rows, "float32", (lanes, *rows.shape[1:2], len(ROW_FIELDS))),
            "step": (step, "int32", (lanes,)),
            "seed": (seed, "int64", (lanes,)),
            "fault": (fault, "int32", (lanes,)),
            "y": (y, "float32", latents.shape),
            "known": (known, "float32", latents.shape),
            "mask": (mask, "float32", (lanes, 1, *latents.shape[2:])),
            "noise": (noise, "float32", latents.shape),
        }
        for name, (buffer, dtype, shape) in wanted.items():
            if buffer is not None:
                _require(name, buffer, (dtype,), shape)
        self._device = device
        self._arena = (latents, history, rows, step, seed, fault)
        self._optional = (y, known, mask, noise)
        self._lanes = lanes
        self._row_count = np.int32(rows.shape[1])
        self._factors = device.empty((lanes,), "float32")  # one per position in the batch, for the rescale
        blocks = -(-self._elements // (4 * THREADS))
        self._grid = (blocks, THREADS)
        self._kernels = {
            name: device.kernel(name)
            for name in (
                "next_step",
                *(f"prepare_{model}_{time}" for model in _MODEL_DTYPES for time in _TIMESTEP_DTYPES),
                *(f"{part}_{model}" for part in ("advance", "guidance_factor") for model in _MODEL_DTYPES),
            )
        }

    def prepare(self, active: Buffer, sample: Buffer, timestep: Buffer, *, guided: bool) -> None:
        """See ``StepKernels``. Enqueues one kernel."""
        batch = self._batch(active)
        total = 2 * batch if guided else batch
        _require("sample", sample, _MODEL_DTYPES, (total, *self._arena[0].shape[1:]))
        _require("timestep", timestep, _TIMESTEP_DTYPES, (total,))
        latents, _, rows, step, _, _ = self._arena
        self._launch(
            f"prepare_{sample.dtype}_{timestep.dtype}", (self._grid[0], batch), THREADS,
            latents.ptr, rows.ptr, step.ptr, active.ptr, sample.ptr, timestep.ptr,
            self._row_count, np.int32(self._elements), np.int32(guided),
        )  # fmt: skip

    def advance(self, active: Buffer, model_output: Buffer, *, guided: bool, rescale: bool) -> None:
        """See ``StepKernels``. Enqueues two kernels, three with ``rescale``."""
        batch = self._batch(active)
        total = 2 * batch if guided else batch
        channels, *spatial = self._arena[0].shape[1:]
        twice = model_output.shape[1:2] == (2 * channels,)
        _require("model_output", model_output, _MODEL_DTYPES, (total, (1 + twice) * channels, *spatial))
        latents, history, rows, step, seed, fault = self._arena
        elements, output_elements = np.int32(self._elements), np.int32(self._elements * (1 + twice))
        rescaled = guided and rescale
        if rescaled:
            self._launch(
                f"guidance_factor_{model_output.dtype}", (batch, 1), MOMENT_THREADS,
                rows.ptr, step.ptr, active.ptr, model_output.ptr, self._factors.ptr,
                self._row_count, elements, np.int32(self._spatial), output_elements,
            )  # fmt: skip
        self._launch(
            f"advance_{model_output.dtype}", (self._grid[0], batch), THREADS,
            latents.ptr, history.ptr, rows.ptr, step.ptr, seed.ptr, fault.ptr, active.ptr, model_output.ptr,
            self._factors.ptr if rescaled else 0,
            *(0 if part is None else part.ptr for part in self._optional),
            np.int32(self._lanes), self._row_count, elements, np.int32(self._spatial), output_elements,
            np.int32(guided),
        )  # fmt: skip
        self._launch("next_step", (-(-batch // THREADS), 1), THREADS, step.ptr, active.ptr, np.int32(batch))

    def _batch(self, active: Buffer) -> int:
        _require("active", active, ("int32",), active.shape[:1])
        if not 1 <= active.shape[0] <= self._lanes:
            raise BadInput(
                f"{active.shape[0]} active lanes; allowed is 1 to {self._lanes}, the lanes of the arena",
                hint="make the arena larger or the batch smaller",
            )
        return active.shape[0]

    def _launch(self, name: str, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        _launch(self._device, self._kernels[name], grid, threads, *arguments)


def enqueue_initial_noise(device: CudaDevice, latents: Buffer, slot: int, seed: int, scale: float) -> None:
    """Writes ``scale * z`` into lane ``slot`` of ``latents``, in stream order."""
    elements = int(np.prod(latents.shape[1:]))
    _launch(
        device, device.kernel("initial_noise"), (-(-elements // (4 * THREADS)), 1), THREADS,
        latents.ptr + slot * elements * 4, np.uint64(seed & (2**64 - 1)), np.float32(scale), np.int32(elements),
    )  # fmt: skip


def enqueue_scaled_copy(device: CudaDevice, target: Buffer, source: Buffer, scale: float) -> None:
    """``target = scale * source``, float32, in stream order."""
    _require("source", source, ("float32",), target.shape)
    _require("target", target, ("float32",), source.shape)
    elements = int(np.prod(target.shape))
    _launch(
        device, device.kernel("scaled_copy"), (-(-elements // THREADS), 1), THREADS,
        target.ptr, source.ptr, np.float32(scale), np.uint64(elements),
    )  # fmt: skip


def _launch(device: CudaDevice, kernel: Any, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
    """Python integers go as 8-byte pointers, numpy scalars as what they are."""
    from cuda.core import LaunchConfig, launch

    device.calls["launch"] += 1
    launch(device.stream, LaunchConfig(grid=(*grid, 1), block=(threads, 1, 1)), kernel, *arguments)


def _require(name: str, buffer: Buffer, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if buffer.dtype not in dtypes or buffer.shape != shape:
        raise BadInput(
            f"{name} is {buffer.dtype}{list(buffer.shape)}; allowed is {' or '.join(dtypes)} {list(shape)}",
            hint="give prepare and advance buffers of the shapes and dtypes that StepKernels documents",
        )
