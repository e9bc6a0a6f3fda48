"""The arena: the latents, history, tables and counters of all lanes, in device buffers that never move."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import ArenaBuffers, Buffer, Device, StepKernels
from tstitch_engines.device.step_row import HISTORY, ROW_FIELDS

__all__ = ["LaneArena", "arena_bytes"]


def arena_bytes(slots: int, elements: int, table_rows: int) -> int:
    """Of an arena: latents, the estimates remembered and y, a table, step, fault and seed for each lane."""
    return slots * ((2 + HISTORY) * 4 * elements + 4 * len(ROW_FIELDS) * table_rows + 4 + 4 + 8)


class LaneArena:
    """``slots`` lanes of ``[C,H,W]`` float32 latents, each with its own table of up to ``table_rows`` rows.

    Everything a captured step touches lives here for as long as the runtime does; a new request only writes into it.
    It is made for the largest latent; ``shape`` looks at the same memory as lanes of a smaller one.
    """

    def __init__(self, device: Device, *, slots: int, latent_shape: tuple[int, int, int], table_rows: int) -> None:
        self.slots = slots
        self.latent_shape = latent_shape
        self.table_rows = table_rows
        self._device = device
        self._largest = latent_shape
        self._latents = self.latents = device.empty((slots, *latent_shape), "float32")
        self._history = self.history = device.empty((HISTORY, slots, *latent_shape), "float32")
        self._y = self.y = device.empty((slots, *latent_shape), "float32")
        self.rows = device.empty((slots, table_rows, len(ROW_FIELDS)), "float32")
        self.step = device.empty((slots,), "int32")
        self.seed = device.empty((slots,), "int64")
        self.fault = device.empty((slots,), "int32")
        for buffer in (self.latents, self.history, self.y, self.rows):
            device.upload(buffer, np.zeros(buffer.shape, np.float32))
        self.kernels = self._kernels()
        self._shapes = {latent_shape: (self.latents, self.history, self.y, self.kernels)}
        self._kept: dict[str, Buffer] = {}  # known, mask and noise, for the largest latent; from the first use on
        self._blending: dict[tuple[int, int, int], tuple[dict[str, Buffer], StepKernels]] = {}

    def _kernels(self, **kept: Buffer) -> StepKernels:
        return self._device.step_kernels(
            ArenaBuffers(
                **kept,
                latents=self.latents,
                history=self.history,
                rows=self.rows,
                step=self.step,
                seed=self.seed,
                fault=self.fault,
                y=self.y,
            )
        )

    def shape(self, latent_shape: tuple[int, int, int]) -> None:
        """Makes the lanes ``[C,H,W]``, at most as large as they were made; what they hold is then meaningless.

        The kernels of a shape stay the same for good, for steps that were recorded with them. Allocates at most when a
        shape is new.
        """
        if latent_shape == self.latent_shape:
            return
        self.latent_shape = latent_shape
        if latent_shape not in self._shapes:
            assert math.prod(latent_shape) <= math.prod(self._largest), "the arena is too small for this latent"
            self.latents = self._device.view(self._latents, 0, (self.slots, *latent_shape), "float32")
            self.history = self._device.view(self._history, 0, (HISTORY, self.slots, *latent_shape), "float32")
            self.y = self._device.view(self._y, 0, (self.slots, *latent_shape), "float32")
            self._shapes[latent_shape] = (self.latents, self.history, self.y, self._kernels())
        self.latents, self.history, self.y, self.kernels = self._shapes[latent_shape]

    @property
    def blending(self) -> StepKernels:
        """The kernels for rows ``with_blend``: those of ``kernels``, with what ``keep`` writes. May allocate, once."""
        return self._blend()[1]

    def keep(self, known: NDArray[np.float32], mask: NDArray[np.float32], noise: NDArray[np.float32]) -> None:
        """What stays of a picture in the first B slots: its latent ``[B,C,H,W]`` outside ``mask [B,1,H,W]`` (0: known).

        ``noise`` ``[B,C,H,W]`` is the unit noise that these lanes started from.
        """
        buffers = self._blend()[0]
        for name, values in (("known", known), ("mask", mask), ("noise", noise)):
            whole = np.zeros(buffers[name].shape, np.float32)
            whole[: len(values)] = values
            self._device.upload(buffers[name], whole)

    def _blend(self) -> tuple[dict[str, Buffer], StepKernels]:
        if not self._kept:
            channels, height, width = self._largest
            for name, depth in (("known", channels), ("mask", 1), ("noise", channels)):
                self._kept[name] = self._device.empty((self.slots, depth, height, width), "float32")
        if self.latent_shape not in self._blending:
            channels, height, width = self.latent_shape
            views = {
                name: self._device.view(
                    block, 0, (self.slots, 1 if name == "mask" else channels, height, width), "float32"
                )
                for name, block in self._kept.items()
            }
            self._blending[self.latent_shape] = (views, self._kernels(**views))
        return self._blending[self.latent_shape]

    @property
    def nbytes(self) -> int:
        parts = (self._latents, self._history, self._y, self.rows, self.step, self.seed, self.fault)
        return sum(part.nbytes for part in (*parts, *self._kept.values()))

    def start(
        self,
        rows: NDArray[np.float32],
        seeds: list[int],
        *,
        step: int,
        scale: float,
        latents: NDArray[np.float32] | Buffer | None,
    ) -> None:
        """Fills the first ``len(seeds)`` slots: one table ``rows`` float32 ``[N,25]`` for all, a seed for each.

        ``scale * latents`` (float32 ``[B,C,H,W]`` on the host or on the device, for the first B slots) are the state
        before ``step``; ``None`` draws the latents by each seed.
        """
        count = len(seeds)
        table = np.zeros(self.rows.shape, np.float32)
        table[:, : len(rows)] = rows
        self._device.upload(self.rows, table)
        self._device.upload(self.step, np.full(self.slots, step, np.int32))
        self._device.upload(self.fault, np.full(self.slots, -1, np.int32))
        bits = np.zeros(self.slots, np.uint64)
        bits[:count] = np.array(seeds, np.uint64)
        self._device.upload(self.seed, bits.view(np.int64))
        if latents is None:
            for slot, seed in enumerate(seeds):
                self._device.initial_noise(self.latents, slot, seed, scale)
        elif isinstance(latents, np.ndarray):
            state = np.zeros(self.latents.shape, np.float32)
            np.multiply(latents, np.float32(scale), out=state[: len(latents)])
            self._device.upload(self.latents, state)
        else:
            for slot, seed in enumerate(seeds[latents.shape[0] :], latents.shape[0]):  # spare lanes: anything finite
                self._device.initial_noise(self.latents, slot, seed, scale)
            self._device.scaled_copy(self.first(latents.shape[0]), latents, scale)

    def first(self, count: int) -> Buffer:
        """The latents of the first ``count`` slots, float32 ``[count,C,H,W]``."""
        return self._device.view(self.latents, 0, (count, *self.latent_shape), "float32")
