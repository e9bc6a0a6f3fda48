"""DDIM (arXiv 2010.02502)."""

from __future__ import annotations

from tstitch_trt.solvers.base import Solver, gaussian

__all__ = ["DDIM"]


# diffusers' DDIMScheduler steps to t - T // N. For ``leading`` that is the next timestep of the list; for ``linspace``,
# and for ``trailing`` where N does not divide T, it is not: ``step_to="stride"`` does the same, while by default a step
# ends where the next one begins. ``final`` is its set_alpha_to_one.
DDIM = Solver(
    name="ddim",
    summary="deterministic at eta 0, DDPM's posterior at eta 1",
    space="vp",
    defaults={"eta": 0.0, "final": "zero", "step_to": "next"},
    coefficients=gaussian,
    from_zero_signal=True,
)
