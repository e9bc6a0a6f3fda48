"""UniPC (arXiv 2302.04867) on the clean estimate: UniP of order p predicts, UniC corrects with the next evaluation.

Both integrate a polynomial through the last estimates from a latent ``y`` at ``(a, s)`` to ``(a', s')``, with
``h`` the step in log signal-to-noise, ``u = -h``, ``r_k`` the places of earlier estimates in units of ``h``:

    x' = (s'/s) y - a' expm1(u) D0 - a' B(h) sum_k rho_k (D_k - D0) / r_k

``rho`` solves ``sum_k rho_k r_k^(i-1) = b_i``; ``B(h)`` is ``u`` (bh1) or ``expm1(u)`` (bh2). UniC has one place more,
``r = 1``, for the estimate at the end of the step, and so needs the model there: a row first corrects the latent that
it was given (``y'``, from the ``y`` and the estimates of the step before), which the model has seen uncorrected as in
the published code, and then predicts from the corrected one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.solvers.base import Grid, Solver
from tstitch_trt.solvers.options import SolverOptions, uncorrected_steps
from tstitch_trt.solvers.table import Coefficients

__all__ = ["UNIPC"]

Array = NDArray[np.float64]


def _update(grid: Grid, step: int, order: int, *, kind: str, corrector: bool) -> tuple[float, Array]:
    """The factor of ``y`` and those of ``(D_end, D0, D1, D2)`` for a step from level ``step``; ``D_end`` is the
    estimate at its end, 0 for the predictor."""
    with np.errstate(divide="ignore"):
        level = -np.log(grid.s / grid.a)
    h = level[step + 1] - level[step]
    a_to, keep = grid.a[step + 1], grid.s[step + 1] / grid.s[step]
    factors = np.zeros(4)
    if not np.isfinite(h):  # the end without noise: order 1, the estimate itself
        factors[1] = a_to
        return 0.0, factors
    if h == 0:  # the end of a trajectory that ends at its last level: a step that rests
        return 1.0, factors
    u = -h
    phi1 = np.expm1(u)
    scale = u if kind == "bh1" else phi1
    places = np.append([(level[step - k] - level[step]) / h for k in range(1, order)], 1.0)
    moments, phi, factorial = [], phi1 / u - 1, 1
    for i in range(1, order + 1):
        moments.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / u - 1 / factorial
    powers = np.vander(places, order, increasing=True).T
    if corrector:
        rho = np.array([0.5]) if order == 1 else np.linalg.solve(powers, np.array(moments))
    elif order == 2:
        rho = np.array([0.5])
    else:
        rho = np.linalg.solve(powers[:-1, :-1], np.array(moments[:-1]))
    factors[1] = -a_to * phi1
    weights = -a_to * scale * rho
    for k in range(1, order):
        factors[1 + k] += weights[k - 1] / places[k - 1]
        factors[1] -= weights[k - 1] / places[k - 1]
    if corrector:
        factors[0] += weights[-1]
        factors[1] -= weights[-1]
    return float(keep), factors


def _coefficients(grid: Grid, options: SolverOptions) -> Coefficients:
    highest, kind = options.order, options.formula
    assert highest is not None
    assert kind is not None
    assert options.uncorrected is not None
    n = grid.steps
    order = np.minimum(grid.age + 1, highest)
    if options.lower_order_final:
        order = np.minimum(order, n - np.arange(n))
    if grid.s[-1] == 0:
        order[-1] = 1
    names = ("A", "B", "C", "E", "F", "Y", "YX", "YY", "YB", "YC", "YE", "YF")
    columns: dict[str, Any] = {name: np.zeros(n) for name in names}
    uncorrected = uncorrected_steps(options.uncorrected)
    for i in range(n):
        keep, predict = _update(grid, i, int(order[i]), kind=kind, corrector=False)
        predict = np.append(predict[1:], 0.0)  # of D, D1, D2, D3
        if grid.age[i] == 0 or i - 1 in uncorrected:
            columns["A"][i], columns["YX"][i] = keep, 1.0
        else:
            kept, correct = _update(grid, i - 1, int(order[i - 1]), kind=kind, corrector=True)
            columns["Y"][i], columns["YY"][i] = keep * kept, kept
            predict += keep * correct  # the corrector's D0 is this row's D1
            for name, value in zip(("YB", "YC", "YE", "YF"), correct, strict=True):
                columns[name][i] = value
        for name, value in zip("BCEF", predict, strict=True):
            columns[name][i] = value
    return Coefficients(**columns)


def _idle(options: SolverOptions) -> Mapping[str, str]:
    return {"lower_order_final": "every step is of order 1"} if options.order == 1 else {}


UNIPC = Solver(
    name="unipc",
    summary="predictor and corrector of order 1 to 3 over the last estimates",
    space="vp",
    defaults={"final": "zero", "order": 2, "formula": "bh2", "lower_order_final": True, "uncorrected": ""},
    coefficients=_coefficients,
    extra_point=True,
    multistep=True,
    idle=_idle,
)
