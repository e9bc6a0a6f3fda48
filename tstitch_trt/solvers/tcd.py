"""Trajectory consistency distillation (arXiv 2402.19159, algorithm 4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.solvers.base import Grid, Solver
from tstitch_trt.solvers.lcm import chain_timesteps
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["TCD"]

Array = NDArray[np.float64]


def _via(options: SolverOptions, t: Array, stride: int) -> Array:
    """The timesteps that the model is asked for, from which noise leads back to the next one."""
    assert options.eta is not None
    return np.floor((1 - options.eta) * np.append(t[1:], 0.0))


def _coefficients(grid: Grid, options: SolverOptions) -> Coefficients:
    """``x' = r (a_m D + s_m (x - a D) / s) + sqrt(1 - r^2) z`` with ``r = a' / a_m``, by way of a level ``(a_m, s_m)``.

    The last step draws no noise: it ends there.
    """
    assert grid.via is not None
    (a_via, s_via), a, s = grid.via, grid.a[:-1], grid.s[:-1]
    ratio = grid.a[1:] / a_via
    noise = np.sqrt(np.maximum(1 - ratio**2, 0.0))
    noise[-1], ratio[-1] = 0.0, 1.0
    kept = ratio * s_via / s
    return Coefficients(A=kept, B=ratio * a_via - kept * a, S=noise)


TCD = Solver(
    name="tcd",
    summary="few steps of a trajectory consistency model, with fresh noise by eta",
    space="vp",
    defaults={"original_steps": 50, "eta": 0.0},
    coefficients=_coefficients,
    from_zero_signal=True,
    timesteps=chain_timesteps,
    via=_via,
    final="sigma-min",
)
