"""One request at several fractions of the steps on the first member, with the time per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.progress import Progress
from tstitch_trt.runtime.result import Result

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["FractionImages", "counts_text", "draw_fractions", "warm_up_fractions"]


@dataclass(frozen=True)
class FractionImages:
    """``images``: one per seed, uint8 ``[N,H,W,C]``. ``ms``: per image, of its steps, without decoding."""

    fraction: float
    result: Result

    @property
    def images(self) -> NDArray[np.uint8]:
        assert self.result.images is not None, "bundles without a decoder are refused before"
        return self.result.images

    @property
    def ms(self) -> float:
        return self.result.total_ms / len(self.result.seeds)

    @property
    def members(self) -> str:
        return counts_text(self.result.schedule.counts)


def counts_text(counts: Mapping[str, int]) -> str:
    """Steps by member: ``8 small + 12 large``."""
    return " + ".join(f"{steps} {name}" for name, steps in counts.items())


def warm_up_fractions(runtime: Runtime, request: Mapping[str, Any]) -> None:
    """Runs every member that a fraction goes between: the first runs of an engine are slow."""
    for fraction in (0.0, 1.0):
        runtime.sample(**{**request, "steps": 2}, fraction=fraction, decode=fraction == 0)


def draw_fractions(
    runtime: Runtime,
    fractions: Sequence[float],
    pictures: Mapping[str, Any],
    settings: Mapping[str, Any],
    progress: Progress,
) -> Iterator[FractionImages]:
    """Each fraction in turn, in the order given. Raises what ``Runtime.plan`` raises before anything is drawn.

    ``pictures``: keywords of ``Runtime.sample`` for what to draw, seeds included. ``settings``: of ``Runtime.plan``,
    without a schedule.
    """
    for fraction in fractions:
        runtime.plan(fraction=fraction, **settings)
    for index, fraction in enumerate(fractions):
        progress(f"drawing at fraction {fraction:g}", index / len(fractions))
        yield FractionImages(fraction, runtime.sample(**pictures, **settings, fraction=fraction))
