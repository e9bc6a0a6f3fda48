"""What a request costs, by the calibration: time = sum of member steps + overhead, chunk by chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from tstitch_engines.errors import BadInput
from tstitch_trt.plan.plan import Plan
from tstitch_trt.study.records import Calibration

__all__ = ["chunk_ms", "kinds_of", "predict_ms", "switches_of"]

Kinds = tuple[tuple[str, bool], ...]  # the member of each step, and whether the step is guided


def predict_ms(
    calibration: Calibration, plan: Plan, *, batch: int, size: tuple[int, int] | None = None, start: int = 0
) -> float:
    """Milliseconds of a whole request of ``batch`` images over ``plan``, as ``Result.total_ms`` counts them.

    The trajectories alone: texts, pictures to start from and decoding are no part of it. The images are split into
    chunks as the runtime splits them. ``size``: height and width of the latent, by default the first that was measured
    (the bundle's own). ``start``: the first step that runs.

    Between batches that were measured the cost is interpolated linearly. Raises ``BadInput`` for a batch outside them,
    a size or a member that was not measured: nothing is extrapolated.
    """
    if batch < 1:
        raise BadInput(f"batch {batch}; allowed is 1 or more", hint="e.g. batch=8")
    if not 0 <= start < plan.steps:
        raise BadInput(f"start {start} is outside 0..{plan.steps - 1}", hint="0 runs all steps")
    if size is None:
        first = calibration.steps[0]
        size = (first.height, first.width)
    kinds = kinds_of(plan)[start:]
    counts = Counter(calibration.splitting.chunks(batch, guided=any(plan.guided)))
    return sum(
        times * chunk_ms(calibration, kinds, calibration.splitting.lanes(count, guided=plan.guided), size)
        for count, times in counts.items()
    )


def kinds_of(plan: Plan) -> Kinds:
    return tuple(zip(plan.schedule.names, plan.guided, strict=True))


def switches_of(kinds: Kinds) -> int:
    """How often the member changes, or the steps from guided to unguided or back."""
    return sum(before != after for before, after in pairwise(kinds))


def chunk_ms(calibration: Calibration, kinds: Kinds, lanes: int, size: tuple[int, int]) -> float:
    """Milliseconds of one chunk that runs ``kinds`` on ``lanes`` lanes of latents of ``size``. Raises ``BadInput``."""
    height, width = size
    here = [over for over in calibration.overheads if (over.height, over.width) == size]
    if not here:
        known = sorted({(over.width, over.height) for over in calibration.overheads})
        raise BadInput(
            f"latents of {width}x{height} (width x height) were not calibrated; measured are "
            + ", ".join(f"{w}x{h}" for w, h in known),
            hint="measure them: tstitch-trt calibrate BUNDLE --size WIDTHxHEIGHT (in pixels)",
        )
    once = _between([(over.batch, over.ms) for over in here], lanes, "the overhead was")
    switch = _between([(over.batch, over.switch_ms) for over in here], lanes, "the overhead was")
    total = once + switch * switches_of(kinds)
    for (member, guided), steps in Counter(kinds).items():
        curve = [
            (cost.batch, cost.ms)
            for cost in calibration.steps
            if (cost.member, cost.guided, cost.height, cost.width) == (member, guided, *size)
        ]
        total += steps * _between(curve, lanes, f"{'guided' if guided else 'unguided'} steps of {member!r} were")
    return total


def _between(curve: Iterable[tuple[int, float]], lanes: int, what: str) -> float:
    """The value at ``lanes``, linear between its neighbours."""
    points = sorted(curve)
    if points and points[0][0] <= lanes <= points[-1][0]:
        batches, values = zip(*points, strict=True)
        return float(np.interp(lanes, batches, values))
    measured = f"measured at batch {', '.join(str(batch) for batch, _ in points)}" if points else "not measured"
    raise BadInput(
        f"{lanes} images at once are outside what was calibrated: {what} {measured}",
        hint=f"measure it: tstitch-trt calibrate BUNDLE --batch {','.join(map(str, sorted({*dict(points), lanes})))}",
    )
