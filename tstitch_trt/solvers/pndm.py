"""PLMS of pseudo numerical methods (arXiv 2202.09778) without Runge-Kutta steps, as Stable Diffusion pipelines run it.

The noise prediction ``e`` is extrapolated by Adams-Bashforth over earlier evaluations and used in DDIM's step. The
first step is taken twice: after it the model runs at the second timestep, and the step is repeated from its first
latent with the mean of both predictions. That second prediction is not used again:

    row 0   t0 -> t1 with e0;  y <- x
    row 1   t0 -> t1 from y with (e1 + e0) / 2;  y <- e0
    row 2   t1 -> t2 with (3 e2 - e0) / 2
    row 3   t2 -> t3 with (23 e3 - 16 e2 + 5 e0) / 12
    row 4   t3 -> t4 with (55 e4 - 59 e3 + 37 e2 - 9 e0) / 24, where e0, four rows back, comes from y
    row i   (55 e - 59 e' + 37 e'' - 9 e''') / 24 of the last four
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.solvers.base import Grid, Solver
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["PNDM"]

_WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _coefficients(grid: Grid, options: SolverOptions) -> Coefficients:
    """With ``remember="v"`` the extrapolation is of the velocity, as diffusers has it for v-prediction models."""
    velocity = options.remember == "v"
    n = grid.steps
    s = grid.s[:-1]
    keep = grid.a[1:] / grid.a[:-1]  # DDIM from x with noise e: x' = keep x + gain e
    gain = grid.s[1:] - keep * s
    from_x, from_d = keep, gain
    if velocity:  # e = a v + s x
        from_x, from_d = keep + gain * s, gain * grid.a[:-1]
    columns: dict[str, Any] = {name: np.zeros(n) for name in ("A", "B", "C", "E", "F", "Y", "YX", "YC")}
    starts = np.arange(n) - grid.age
    for i in range(n):
        start = int(starts[i])
        if i == 1:
            if start == 1:  # nothing to repeat: the latent is at t1 already
                columns["A"][1] = 1.0
                continue
            columns["Y"][1] = from_x[0]
            columns["B"][1] = columns["C"][1] = from_d[0] / 2
            continue
        columns["A"][i] = from_x[i]
        rows = [j for j in range(i, start - 1, -1) if j != 1][:4]
        for j, weight in zip(rows, _WEIGHTS[len(rows) - 1], strict=True):
            if i - j == 4:  # row 4, where y holds e0
                columns["Y"][i] = from_d[i] * weight
                columns["YC"][1] = 1.0
            else:
                columns["BCEF"[i - j]][i] = from_d[i] * weight
    if n > 1:
        columns["YX"][0] = 1.0
    return Coefficients(
        **columns, estimate="v" if velocity else "eps", keeps_mean=not velocity, keeps_variance=not velocity
    )


def _twice(t: NDArray[np.float64]) -> NDArray[np.float64]:
    return t if t.size < 2 else np.insert(t, 1, t[1])


PNDM = Solver(
    name="pndm",
    summary="PLMS of order 4, one more evaluation than steps",
    space="vp",
    defaults={"final": "sigma-min", "remember": "eps"},
    coefficients=_coefficients,
    evaluations=_twice,
)
