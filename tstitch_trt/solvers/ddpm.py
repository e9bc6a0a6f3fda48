"""Ancestral sampling of DDPM on the respaced chain, with the variances of Improved DDPM (arXiv 2102.09672)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tstitch_trt.solvers.base import Grid, Solver, gaussian_step
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["DDPM"]


_LEAST_STD = 1e-10  # diffusers' floor under the posterior variance, as a deviation


def _idle(options: SolverOptions) -> Mapping[str, str]:
    return {"last_noise": "the posterior variance of the last step is 0"} if options.variance == "fixed-small" else {}


def _coefficients(grid: Grid, options: SolverOptions) -> Coefficients:
    """The mean is the posterior's (arXiv 2006.11239, eq. 7) whatever the variance.

    ``fixed-small`` is the posterior variance, ``fixed-large`` is beta, ``learned`` lets the model choose between the
    two for each element (arXiv 2102.09672, eq. 15). The last step adds no noise, as in the published samplers.
    ``last_noise``: it does unless its timestep is 0, as in diffusers, with a posterior variance of 1e-20.
    """
    posterior = gaussian_step(grid, eta=1.0)
    small = posterior.S
    if options.variance == "fixed-small":
        return posterior
    beta = 1 - (grid.a[:-1] / grid.a[1:]) ** 2
    large = np.sqrt(beta)
    quiet = not options.last_noise or grid.t[-1] == 0
    if quiet:
        large[-1] = 0.0
    if options.variance == "fixed-large":
        return replace(posterior, S=large, keeps_variance=False)
    log_min, log_max = np.zeros_like(small), np.zeros_like(small)
    log_min[:-1], log_max[:-1] = np.log(small[:-1]), np.log(large[:-1])
    drawn = np.ones_like(small)
    if quiet:
        drawn[-1] = 0.0
    else:
        log_min[-1], log_max[-1] = np.log(_LEAST_STD), np.log(large[-1])
    return replace(
        posterior, S=drawn, log_std_min=log_min, log_std_max=log_max, uses_variance=True, keeps_variance=False
    )


DDPM = Solver(
    name="ddpm",
    summary="ancestral sampling with fixed-small, fixed-large or learned variance",
    space="vp",
    defaults={"variance": "fixed-small", "last_noise": False},
    coefficients=_coefficients,
    from_zero_signal=True,
    idle=_idle,
)
