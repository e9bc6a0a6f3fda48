"""One request at several fractions of the steps on the first member, with the time per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.progress import Progress
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.runtime.result import Result

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["FractionImages", "counts_text", "draw_fractions", "requests_at", "warm_up_fractions"]


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


def requests_at(
    manifest: Manifest, fractions: Sequence[float], pictures: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Keywords of ``Runtime.sample`` at each of ``fractions``; ``pictures`` and ``settings`` as in ``draw_fractions``.

    A negative prompt is left out where a member distilled for its scale runs alone, if another fraction reads it.
    """
    plans = [make_plan(manifest, PlanOptions.from_keywords({**settings, "fraction": each})) for each in fractions]
    read = any(any(plan.guided) for plan in plans)
    found = []
    for fraction, plan in zip(fractions, plans, strict=True):
        request = {**pictures, **settings, "fraction": fraction}
        if read and plan.embedded and not any(plan.guided):
            request.pop("negative_prompt", None)
        found.append(request)
    return found


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
