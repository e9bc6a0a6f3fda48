"""What comes back from sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.plan import Plan
from tstitch_trt.schedule import Schedule

__all__ = ["Result", "SegmentTiming", "StepEvent"]


@dataclass(frozen=True)
class SegmentTiming:
    """Milliseconds spent in one segment of the schedule, summed over the chunks of the batch."""

    member: str
    steps: int
    ms: float


@dataclass(frozen=True)
class StepEvent:
    """One step is done. ``step`` counts from 1 to ``steps``; a large batch runs in ``chunks``, one after another."""

    step: int
    steps: int
    chunk: int
    chunks: int
    member: str
    timestep: float
    _latents: Callable[[], NDArray[np.float32]]
    _estimate: Callable[[], NDArray[np.float32]]
    _decode: Callable[[NDArray[np.float32]], NDArray[np.uint8]]

    def latents(self) -> NDArray[np.float32]:
        """The state after this step, float32 ``[B,C,H,W]`` of this chunk. Waits for the device."""
        return self._latents()

    def estimate(self) -> NDArray[np.float32]:
        """The denoised estimate D of this step, float32 ``[B,C,H,W]``. Waits for the device."""
        return self._estimate()

    def preview(self) -> NDArray[np.uint8]:
        """The estimate as pictures, uint8 ``[B,H,W,C]``. Raises ``Unavailable`` for a bundle without a decoder."""
        return self._decode(self._estimate())


@dataclass(frozen=True)
class Result:
    """``images`` uint8 ``[N,H,W,C]`` (``None`` when not decoded), ``latents`` float32 ``[N,C,H,W]``.

    ``total_ms`` is the time of the trajectories alone, without decoding: the sum of ``timings``.
    """

    images: NDArray[np.uint8] | None
    latents: NDArray[np.float32]
    seeds: tuple[int, ...]
    labels: tuple[int, ...]
    plan: Plan
    timings: tuple[SegmentTiming, ...]

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    @property
    def total_ms(self) -> float:
        return sum(part.ms for part in self.timings)
