"""Euler and ancestral Euler on variance-exploding latents (arXiv 2206.00364, algorithm 1; k-diffusion)."""

from __future__ import annotations

from tstitch_trt.solvers.base import Solver, gaussian, idle_noise

__all__ = ["EULER", "EULER_ANCESTRAL"]


EULER = Solver(
    name="euler",
    summary="first-order ODE solver in sigma",
    space="ve",
    defaults={"final": "zero"},
    coefficients=gaussian,
    continuous=True,
)
EULER_ANCESTRAL = Solver(
    name="euler-ancestral",
    summary="Euler with fresh noise at every step",
    space="ve",
    defaults={"eta": 1.0, "s_noise": 1.0},
    coefficients=gaussian,
    continuous=True,
    idle=idle_noise,
)
