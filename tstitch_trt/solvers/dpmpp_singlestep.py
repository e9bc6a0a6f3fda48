"""DPM-Solver++ singlestep of order 2 and 3 (arXiv 2211.01095, 2206.00927), as diffusers has it.

The steps come in blocks of up to three. Each row of a block starts from the block's first latent, which ``y`` holds,
and goes to its own end with the estimates of the block so far. With ``h`` the distance in log signal-to-noise from the
block's start to the row's end, ``r`` the share of it at which an estimate was made and ``D0`` the block's first:

    order 1   x' = (s'/s) x + a' phi1 D0;  y <- x                                   phi1 = 1 - exp(-h)
    order 2   x' = (s'/s0) y + a' phi1 D0 + c (D - D0) / r                          c = a' phi1 / 2, or a' phi2
    order 3   x' = (s'/s0) y + a' phi1 D0 + a' phi2 (D - D0) / r                    phi2 = 1 - phi1 / h

The orders of a trajectory are 1 2 1 2 ... or 1 2 3 1 2 3 ..., one evaluation each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.solvers.base import Grid, Solver
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["DPMPP_2S", "DPMPP_3S"]


def _orders(grid: Grid, highest: int, options: SolverOptions) -> NDArray[np.int64]:
    """The order of each row; 1 at the end where that has no noise.

    Whole blocks are kept to the end only with ``lower_order_final=False``, and where the steps are a multiple of the
    order and end with noise, as in diffusers.
    """
    n, cycle = grid.steps, np.arange(1, highest + 1)
    order = np.resize(cycle, n)
    if n % highest == 0 and (options.lower_order_final or grid.s[-1] == 0):
        order[-highest:] = [*cycle[:-1], 1]
    if grid.s[-1] == 0:
        order[-1] = 1
    return np.minimum(order, grid.age + 1)


def _coefficients(grid: Grid, options: SolverOptions, *, highest: int) -> Coefficients:
    """``middle="paper"`` has ``a' phi2`` in the second row of a block of three, as DPM-Solver-3 of the papers does.

    With ``second_order="heun"`` a row of order 3 has the second difference of the estimates too.
    """
    order = _orders(grid, highest, options)
    n, a, s, a_to, s_to = grid.steps, grid.a, grid.s, grid.a[1:], grid.s[1:]
    A, B, C, E, Y, YX = (np.zeros(n) for _ in range(6))
    heun = options.second_order == "heun"
    for i in range(n):
        start = i - int(order[i]) + 1
        ratio = (s_to[i] / a_to[i]) / (s[start] / a[start])
        first = a_to[i] * (1 - ratio)
        kept = s_to[i] / s[start]
        if order[i] == 1:
            A[i], B[i], YX[i] = kept, first, 1.0
            continue
        h = -np.log(ratio)
        second = a_to[i] * (np.expm1(-h) / h + 1)
        r0 = -np.log((s[i] / a[i]) / (s[start] / a[start])) / h
        Y[i] = kept
        if order[i] == 2:
            inner = i + 1 < n and order[i + 1] == 3 and options.middle == "paper"
            c = second if heun or inner else first / 2
            B[i], C[i] = c / r0, first - c / r0
            continue
        r1 = -np.log((s[i - 1] / a[i - 1]) / (s[start] / a[start])) / h
        newest, middle = second / r0, 0.0
        if heun:
            third = -2 * a_to[i] * ((np.expm1(-h) + h) / h**2 - 0.5)
            newest = (third - r1 * second) / (r0 * (r0 - r1))
            middle = (r0 * second - third) / (r1 * (r0 - r1))
        B[i], C[i], E[i] = newest, middle, first - newest - middle
    reads = np.flatnonzero(Y)
    YX[~np.isin(np.arange(n), reads - order[reads] + 1)] = 0.0  # a block of one row has nothing to keep
    return Coefficients(A=A, B=B, C=C, E=E, Y=Y, YX=YX)


def _idle(options: SolverOptions) -> Mapping[str, str]:
    found = {}
    if options.final == "zero":
        found["lower_order_final"] = "a last step to no noise is of order 1"
    if options.second_order == "heun" and options.middle is not None:
        found["middle"] = "second_order='heun' has that formula already"
    return found


def _solver(name: str, highest: int, **defaults: str) -> Solver:
    return Solver(
        name=name,
        summary=f"DPM-Solver++ of order {highest} in single steps, deterministic",
        space="vp",
        defaults={"final": "zero", "second_order": "midpoint", "lower_order_final": True, **defaults},
        coefficients=partial(_coefficients, highest=highest),
        extra_point=True,
        multistep=True,
        idle=_idle,
    )


DPMPP_2S = _solver("dpmpp-2s", 2)
DPMPP_3S = _solver("dpmpp-3s", 3, middle="diffusers")
