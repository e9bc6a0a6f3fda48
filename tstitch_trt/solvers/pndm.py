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

from tstitch_engines.errors import BadInput
from tstitch_trt.solvers.base import Grid, Solver
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["PNDM"]

Array = NDArray[np.float64]

_WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _coefficients(grid: Grid, options: SolverOptions) -> Coefficients:
    """With ``remember="v"`` the extrapolation is of the velocity, as diffusers has it for v-prediction models.

    ``restart="repeat"``: a restart repeats its first step too, as in diffusers' pipelines that start from a picture.
    Their list has no second timestep there, so from then on the latent is one step noisier than the model is told.
    Raises ``BadInput`` for restarts at both rows of one timestep.
    """
    velocity, repeats = options.remember == "v", options.restart == "repeat"
    n = grid.steps
    row = np.arange(n)
    starts = row - grid.age
    if n > 2 and repeats and (starts[1:3] == (1, 2)).all():
        raise BadInput(
            "solver 'pndm' with restart='repeat' can't restart at steps 1 and 2: both are at the same timestep",
            hint="let the schedule switch one step later, or leave history='reset' out",
        )
    repeated = (starts == 0) | repeats
    again = repeated & (grid.age == 1)
    rests = (row == 1) & (starts == 1) & (not repeats)  # nothing to repeat: the latent is at t1 already
    (a_from, a_to), (s_from, s_to) = _steps(grid, again)
    keep = a_to / a_from  # DDIM from x with noise e: x' = keep x + gain e
    gain = s_to - keep * s_from
    from_x, from_d = keep, gain
    if velocity:  # e = a v + s x
        from_x, from_d = keep + gain * s_from, gain * a_from
    columns: dict[str, Any] = {name: np.zeros(n) for name in ("A", "B", "C", "E", "F", "Y", "YX", "YC")}
    columns["YX"][:-1] = (repeated & (grid.age == 0))[:-1]
    for i in row:
        if rests[i]:
            columns["A"][i] = 1.0
            continue
        if again[i]:
            columns["Y"][i] = from_x[i]
            columns["B"][i] = columns["C"][i] = from_d[i] / 2
            continue
        columns["A"][i] = from_x[i]
        used = [j for j in range(i, starts[i] - 1, -1) if not again[j] and not rests[j]][:4]
        for j, weight in zip(used, _WEIGHTS[len(used) - 1], strict=True):
            if i - j == 4:  # the first row, whose estimate y holds
                columns["Y"][i] = from_d[i] * weight
                columns["YC"][j + 1] = 1.0
            else:
                columns["BCEF"[i - j]][i] = from_d[i] * weight
    exact = not velocity and not (again & (starts > 0)).any() and grid.ends is None
    return Coefficients(**columns, estimate="v" if velocity else "eps", keeps_mean=exact, keeps_variance=exact)


def _steps(grid: Grid, again: NDArray[np.bool_]) -> list[tuple[Array, Array]]:
    """For ``a`` and ``s``, float64 ``[N]`` each: the levels that each row takes its latent to be at, and steps to.

    With ``step_to="stride"`` (``ends``) a row steps from its timestep to one stride below, and the repetition of a step
    from one stride above its timestep to there, as in diffusers; that is exact for spacing ``leading`` alone.
    """
    found = []
    for own, end, above in zip((grid.a, grid.s), grid.ends or (None, None), grid.via or (None, None), strict=True):
        if end is not None:
            assert above is not None
            found.append((np.where(again, above, own[:-1]), np.where(again, own[:-1], end)))
            continue
        row = np.arange(grid.steps)
        step = row - (row > 1) - again  # of the levels at which t1 is there once
        levels = own if grid.steps == 1 else np.delete(own, 1)
        found.append((levels[step], levels[step + 1]))
    return found


def _above(options: SolverOptions, t: Array, stride: int) -> Array:
    return t + stride


def _twice(t: NDArray[np.float64]) -> NDArray[np.float64]:
    return t if t.size < 2 else np.insert(t, 1, t[1])


PNDM = Solver(
    name="pndm",
    summary="PLMS of order 4, one more evaluation than steps",
    space="vp",
    defaults={"final": "sigma-min", "remember": "eps", "restart": "plain", "step_to": "next"},
    coefficients=_coefficients,
    evaluations=_twice,
    via=_above,
    multistep=True,
)
