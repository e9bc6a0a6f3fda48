"""DPM-Solver++ multistep (arXiv 2211.01095) and its stochastic forms, as diffusers and k-diffusion have them.

With ``h`` the step in log signal-to-noise and ``u = (1 + eta) h``, estimates ``D`` interpolated through the last steps
and integrated exactly give

    x' = (s'/s) exp(-eta h) x + a' phi1 D + c1 d1 + c2 d2 + s' sqrt(1 - exp(-2 eta h)) z
    d1 = h D'(lambda), d2 = h^2 D''(lambda)/2 as divided differences of D, D1, D2;  phi1 = 1 - exp(-u)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.solvers.base import Grid, Solver, idle_noise
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["DPMPP_1", "DPMPP_1_SDE", "DPMPP_2M", "DPMPP_2M_SDE", "DPMPP_3M", "DPMPP_3M_SDE"]

_FEW = 15  # lower_order_final, as in diffusers: below this many steps the last two are of order 2 and 1


def _orders(grid: Grid, highest: int, options: SolverOptions, *, published: bool = False) -> NDArray[np.int64]:
    """The order of each step: what history allows, and 1 where the step ends at zero noise (``h`` is infinite).

    ``published``: no lower order near the end.
    """
    order = np.minimum(grid.age + 1, highest)
    few = bool(options.lower_order_final) and grid.steps < _FEW and not published
    if grid.s[-1] == 0 or options.euler_at_final or few:
        order[-1] = 1
    if few:
        order[-2:-1] = np.minimum(order[-2:-1], 2)
    return order


def _multistep(
    grid: Grid, *, order: NDArray[np.int64], eta: float, s_noise: float, midpoint: bool, d2_shift: float
) -> Coefficients:
    s, a_next, s_next, ratio = grid.s[:-1], grid.a[1:], grid.s[1:], grid.ratio
    A = s_next / s * ratio**eta
    phi1 = a_next * (1 - ratio ** (1 + eta))
    with np.errstate(divide="ignore"):
        h = -np.log(ratio)  # infinite at the last step, whose order is 1
    B, C, E = phi1.copy(), np.zeros_like(A), np.zeros_like(A)
    for i in np.flatnonzero((order > 1) & (h > 0)):
        u = (1 + eta) * h[i]
        phi2 = np.expm1(-u) / u + 1
        # d1_0 = w0 (D - D1), d1_1 = w1 (D1 - D2)
        w0 = h[i] / h[i - 1]
        c1 = phi1[i] / 2 if midpoint and order[i] == 2 else a_next[i] * phi2
        if order[i] == 2:
            B[i] += c1 * w0
            C[i] -= c1 * w0
            continue
        w1 = h[i] / h[i - 2]
        blend = h[i - 1] / (h[i - 1] + h[i - 2])
        c2 = a_next[i] * (-(phi2 / u) + d2_shift) * h[i] / (h[i - 1] + h[i - 2])
        first, second = c1 * (1 + blend) + c2, c1 * blend + c2  # factors of d1_0 and -d1_1
        B[i] += first * w0
        C[i] -= first * w0 + second * w1
        E[i] += second * w1
    std = s_next * np.sqrt(1 - ratio ** (2 * eta))
    return Coefficients(A=A, B=B, C=C, E=E, S=s_noise * std, keeps_variance=s_noise == 1.0 or not std.any())


def _coefficients(grid: Grid, options: SolverOptions, *, highest: int) -> Coefficients:
    """``variant="diffusers"`` is DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++").

    Up to 0.42 it has the d2 term as ``a' ((1 - exp(-u) - u)/u^2 - 1/2)``; the integral, k-diffusion's
    sample_dpmpp_3m_sde and diffusers' own deterministic solver have ``+ 1/2``. ``variant="k-diffusion"`` is that
    formula, with k-diffusion's second-order step after the first and no lower order near the end.
    """
    published = options.variant == "k-diffusion"
    return _multistep(
        grid,
        order=_orders(grid, highest, options, published=published),
        eta=0.0 if options.eta is None else options.eta,
        s_noise=1.0 if options.s_noise is None else options.s_noise,
        midpoint=options.second_order == "midpoint" and not published,
        d2_shift=-0.5 if options.variant == "diffusers" else 0.5,
    )


def _idle(options: SolverOptions) -> Mapping[str, str]:
    found = dict(idle_noise(options))
    if options.variant == "k-diffusion":
        found |= dict.fromkeys(("second_order", "lower_order_final"), "variant='k-diffusion' has formulas of its own")
    if options.final == "zero":
        found["euler_at_final"] = "a last step to no noise is of order 1"
    return found


def _solver(name: str, summary: str, highest: int, **defaults: str | float) -> Solver:
    orders: dict[str, str | bool] = {"second_order": "midpoint", "lower_order_final": True, "euler_at_final": False}
    orders = orders if highest > 1 else {}
    return Solver(
        name=name,
        summary=summary,
        space="vp",
        defaults={**defaults, "final": "zero", **orders},
        coefficients=partial(_coefficients, highest=highest),
        extra_point=True,
        multistep=highest > 1,
        idle=_idle,
    )


DPMPP_1 = _solver("dpmpp-1", "DPM-Solver++ of order 1, deterministic", 1)
DPMPP_1_SDE = _solver("dpmpp-1-sde", "DPM-Solver++ of order 1 with fresh noise", 1, eta=1.0, s_noise=1.0)
DPMPP_2M = _solver("dpmpp-2m", "DPM-Solver++ of order 2, deterministic", 2)
DPMPP_3M = _solver("dpmpp-3m", "DPM-Solver++ of order 3, deterministic", 3)
DPMPP_2M_SDE = _solver("dpmpp-2m-sde", "DPM-Solver++ of order 2 with fresh noise", 2, eta=1.0, s_noise=1.0)
DPMPP_3M_SDE = _solver(
    "dpmpp-3m-sde", "DPM-Solver++ of order 3 with fresh noise", 3, eta=1.0, s_noise=1.0, variant="diffusers"
)
