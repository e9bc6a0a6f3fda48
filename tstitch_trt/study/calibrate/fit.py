"""The cost model of one batch and size, fitted to measured trajectories.

    time of a chunk = overhead + switches x switch cost + sum over the kinds of steps of (steps x step cost)

A least squares fit of the usual times, each weighted by ``sqrt(n)`` over the time of its ``n`` steps: errors are
relative, and the noise of ``n`` steps is ``sqrt(n)`` times that of one. Where overhead or switch cost would be negative
it is 0, and the others are fitted again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tstitch_engines.errors import FailedWork
from tstitch_trt.study.budget.predict import Kinds, switches_of

__all__ = ["Fit", "fit"]


@dataclass(frozen=True)
class Fit:
    """Milliseconds: once, for each switch, and for each step of a kind (member, guided)."""

    once: float
    switch: float
    step: dict[tuple[str, bool], float]


def fit(trajectories: Sequence[tuple[Kinds, float]]) -> Fit:
    """``trajectories``: the kinds of the steps of each, and its milliseconds. Raises ``FailedWork`` for times that do
    not tell the kinds apart."""
    kinds = list(dict.fromkeys(kind for run, _ in trajectories for kind in run))
    times = np.array([ms for _, ms in trajectories], np.float64)
    matrix = np.array([[1.0, switches_of(run), *(Counter(run)[kind] for kind in kinds)] for run, _ in trajectories])
    weights = np.sqrt([len(run) for run, _ in trajectories]) / times
    free = [column for column in range(matrix.shape[1]) if matrix[:, column].any()]
    while True:
        found = np.linalg.lstsq(matrix[:, free] * weights[:, None], times * weights, rcond=None)[0]
        negative = [(value, column) for value, column in zip(found, free, strict=True) if column < 2 and value < 0]
        if not negative:
            break
        free.remove(min(negative)[1])
    values = np.zeros(matrix.shape[1])
    values[free] = found
    steps = {kind: float(ms) for kind, ms in zip(kinds, values[2:], strict=True)}
    if not all(ms > 0 and np.isfinite(ms) for ms in steps.values()):
        raise FailedWork(
            "the measured times do not tell the members apart: "
            + ", ".join(f"a step of {name!r} would be {ms:.3g} ms" for (name, _), ms in steps.items()),
            hint="the machine is too busy: measure again when it is quiet, or with more --repeats",
        )
    return Fit(float(values[0]), float(values[1]), steps)
