"""Euler and ancestral Euler on variance-exploding latents (arXiv 2206.00364, algorithm 1; k-diffusion)."""

from __future__ import annotations

from tstitch_trt.solvers.base import Grid, Solver, gaussian_step
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["EULER", "EULER_ANCESTRAL"]


def _euler(grid: Grid, options: SolverOptions) -> Coefficients:
    return gaussian_step(grid, eta=0.0)


def _ancestral(grid: Grid, options: SolverOptions) -> Coefficients:
    assert options.eta is not None
    assert options.s_noise is not None
    return gaussian_step(grid, eta=options.eta, s_noise=options.s_noise)


EULER = Solver(
    name="euler",
    summary="first-order ODE solver in sigma",
    space="ve",
    defaults={"final": "zero"},
    coefficients=_euler,
    continuous=True,
)
EULER_ANCESTRAL = Solver(
    name="euler-ancestral",
    summary="Euler with fresh noise at every step",
    space="ve",
    defaults={"eta": 1.0, "s_noise": 1.0},
    coefficients=_ancestral,
    continuous=True,
)
