"""The arena: latents, history, tables, counters and conditioning of all lanes, in device buffers that never move."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import ArenaBuffers, Buffer, Device, StepKernels
from tstitch_engines.device.slab import Slab, slab_bytes
from tstitch_engines.device.step_row import HISTORY, ROW_FIELDS
from tstitch_trt.runtime.lane_program import LaneProgram

__all__ = ["LaneArena", "arena_bytes"]


def arena_bytes(slots: int, elements: int, table_rows: int, conditioning: Mapping[str, int]) -> int:
    """Bytes of an arena: latents, history and y; a table, step, fault and seed for each lane; conditioning.

    ``conditioning``: bytes of a lane's row by input; each lane has two.
    """
    lane = (2 + HISTORY) * 4 * elements + 4 * len(ROW_FIELDS) * table_rows + 4 + 4 + 8
    return slots * lane + slab_bytes({name: 2 * slots * row for name, row in conditioning.items()})


class LaneArena:
    """``slots`` lanes of latents up to ``latent_shape`` ``[C,H,W]``, each with a table of up to ``table_rows`` rows.

    A lane is written without touching the others, whatever they are doing, and lanes of several latent sizes lie side
    by side. ``conditioning``: for each input the bytes of its largest row. Every lane has two rows of it, for the
    conditional and the unconditional half.
    """

    def __init__(
        self,
        device: Device,
        *,
        slots: int,
        latent_shape: tuple[int, int, int],
        table_rows: int,
        conditioning: Mapping[str, int],
    ) -> None:
        self.slots = slots
        self.latent_shape = latent_shape
        self.table_rows = table_rows
        self._device = device
        self.buffers = ArenaBuffers(
            latents=device.empty((slots, *latent_shape), "float32"),
            history=device.empty((HISTORY, slots, *latent_shape), "float32"),
            y=device.empty((slots, *latent_shape), "float32"),
            rows=device.empty((slots, table_rows, len(ROW_FIELDS)), "float32"),
            step=device.empty((slots,), "int32"),
            seed=device.empty((slots,), "int64"),
            fault=device.empty((slots,), "int32"),
        )
        for _, buffer in self.buffers.items():  # noqa: PERF102 - no dict
            device.upload(buffer, np.zeros(buffer.shape, buffer.dtype))
        slab = Slab(device, {name: 2 * slots * row for name, row in conditioning.items()})
        device.upload(slab.block, np.zeros(slab.block.shape, np.uint8))
        self._slab = slab
        self.conditioning = {name: slab.view(name, (2, slots, row), "uint8") for name, row in conditioning.items()}
        self._kernels: dict[tuple[tuple[int, int, int], bool], StepKernels] = {}
        self._inpainting: ArenaBuffers | None = None  # the buffers with image, mask and noise; from the first use on
        self._collected: Buffer | None = None

    @property
    def nbytes(self) -> int:
        buffers, collected = self._inpainting or self.buffers, self._collected  # a request may be making them
        more = 0 if collected is None else collected.nbytes
        return sum(buffer.nbytes for _, buffer in buffers.items()) + self._slab.nbytes + more

    def kernels(self, shape: tuple[int, int, int], *, inpaint: bool = False) -> StepKernels:
        """The step kernels for latents of ``shape``, always the same; ``inpaint``: for rows ``with_inpainting``."""
        if (shape, inpaint) not in self._kernels:
            buffers = self._with_inpainting() if inpaint else self.buffers
            self._kernels[shape, inpaint] = self._device.step_kernels(buffers, shape)
        return self._kernels[shape, inpaint]

    def _with_inpainting(self) -> ArenaBuffers:
        if self._inpainting is None:
            channels, height, width = self.latent_shape
            image, mask, noise = (
                self._device.empty((self.slots, depth, height, width), "float32") for depth in (channels, 1, channels)
            )
            self._inpainting = replace(self.buffers, image=image, mask=mask, noise=noise)
        return self._inpainting

    def close(self) -> None:
        self._kernels.clear()

    # --- writing lanes

    def write(self, first: int, programs: Sequence[LaneProgram]) -> None:
        """Puts programs into the slots from ``first`` on. No other slot is touched. Conditioning is written apart."""
        device, count = self._device, len(programs)
        counters: dict[str, NDArray[Any]] = {
            "step": np.array([program.start for program in programs], np.int32),
            "fault": np.full(count, -1, np.int32),
            "seed": np.array([program.seed for program in programs], np.uint64).view(np.int64),
        }
        for name, values in counters.items():
            buffer: Buffer = getattr(self.buffers, name)
            device.upload(device.view(buffer, first * values.itemsize, (count,), buffer.dtype), values)
        sent: LaneProgram | None = None
        for slot, program in enumerate(programs, first):
            rows = self._rows(slot, program)
            if sent is not None and sent.rows is program.rows and sent.start == program.start:  # of one request
                device.copy(rows, self._rows(first, sent))
            else:
                device.upload(rows, program.rows[program.start :])
            sent = sent or program
            shape = (self.latent_shape[0], *program.size)
            lane = self._lane(self.buffers.latents, slot, shape)
            if program.latents is None:
                device.initial_noise(device.view(lane, 0, (1, *shape), "float32"), 0, program.seed, program.scale)
            elif isinstance(program.latents, np.ndarray):
                device.upload(lane, np.multiply(program.latents, np.float32(program.scale)))
            else:
                given = program.latents.buffer
                offset = program.latents.index * (given.nbytes // given.shape[0])
                source = device.view(given, offset, shape, "float32")
                device.scaled_copy(lane, source, program.scale)
            if program.inpainting is not None:
                self._set_inpainting(slot, program)

    def _rows(self, slot: int, program: LaneProgram) -> Buffer:
        """The rows of a slot that the program runs, float32 ``[N - start,25]``."""
        row_bytes, (count, fields) = 4 * len(ROW_FIELDS), program.rows.shape
        place = slot * self.table_rows + program.start
        return self._device.view(self.buffers.rows, place * row_bytes, (count - program.start, fields), "float32")

    def _set_inpainting(self, slot: int, program: LaneProgram) -> None:
        buffers, kept = self._with_inpainting(), program.inpainting
        for name in ("image", "mask", "noise"):
            values: NDArray[np.float32] = getattr(kept, name)
            target = self._lane(getattr(buffers, name), slot, values.shape)
            self._device.upload(target, np.ascontiguousarray(values, np.float32))

    def _lane(self, buffer: Buffer, slot: int, shape: tuple[int, ...]) -> Buffer:
        """The start of a slot in one of the buffers ``[slots, ...]``, as ``shape``."""
        return self._device.view(buffer, slot * (buffer.nbytes // self.slots), shape, "float32")

    def set_conditioning(self, name: str, first: int, half: int, rows: NDArray[Any]) -> None:
        """Writes input ``name`` of the slots from ``first`` on: rows ``[n, ...]`` as the engine stores them."""
        buffer = self.conditioning[name]
        raw = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
        pitch, start = buffer.shape[2], (half * self.slots + first) * buffer.shape[2]
        if raw.shape[1] == pitch:
            self._device.upload(self._device.view(buffer, start, raw.shape, "uint8"), raw)
            return
        for index, row in enumerate(raw):
            self._device.upload(self._device.view(buffer, start + index * pitch, row.shape, "uint8"), row)

    # --- reading lanes

    def lanes(self, first: int, count: int, size: tuple[int, int]) -> Buffer:
        """The latents of consecutive slots, float32 ``[count,C,H,W]``; smaller ones are copied together first."""
        device, shape = self._device, (self.latent_shape[0], *size)
        latents, lane_bytes = self.buffers.latents, 4 * math.prod(shape)
        if shape == self.latent_shape:
            return device.view(latents, first * lane_bytes, (count, *shape), "float32")
        if self._collected is None:
            self._collected = device.empty(latents.shape, "float32")
        for index in range(count):
            target = device.view(self._collected, index * lane_bytes, shape, "float32")
            device.copy(target, self._lane(latents, first + index, shape))
        return device.view(self._collected, 0, (count, *shape), "float32")

    def estimates(self, place: int, first: int, count: int, size: tuple[int, int]) -> NDArray[np.float32]:
        """What the history of consecutive slots holds at ``place``, float32 ``[count,C,H,W]``. Waits."""
        slots = range(first, first + count)
        return np.concatenate([self._device.download(self.estimate(place, slot, size)) for slot in slots])

    def estimate(self, place: int, slot: int, size: tuple[int, int]) -> Buffer:
        """What the history of one slot holds at ``place``, float32 ``[1,C,H,W]``, where it lies."""
        shape = (1, self.latent_shape[0], *size)
        offset = 4 * math.prod(self.latent_shape) * (place * self.slots + slot)
        return self._device.view(self.buffers.history, offset, shape, "float32")

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Puts back at the end of a ``with`` block what the lanes hold now, without inpainting, which no step changes.

        Allocates for that time.
        """
        held = [*(buffer for _, buffer in self.buffers.items()), self._slab.block]
        copies = [self._device.empty(buffer.shape, buffer.dtype) for buffer in held]
        for copy, buffer in zip(copies, held, strict=True):
            self._device.copy(copy, buffer)
        try:
            yield
        finally:
            for copy, buffer in zip(copies, held, strict=True):
                self._device.copy(buffer, copy)
