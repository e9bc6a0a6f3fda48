"""Multistep sampling of latent consistency models (arXiv 2310.04378, algorithm 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput
from tstitch_trt.solvers.base import Grid, Solver
from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["LCM", "chain_timesteps"]

_SIGMA_DATA = 0.5


def chain_timesteps(options: SolverOptions, steps: int, train_steps: int) -> NDArray[np.float64]:
    """``steps`` of the ``original_steps`` timesteps ``k - 1, 2k - 1, ...`` the model was distilled on, noisy first."""
    original = options.original_steps
    assert original is not None
    if original > train_steps:
        raise BadInput(
            f"original_steps is {original}; allowed is 1 to {train_steps}, the timesteps of the noise schedule",
            hint="set original_steps as in the distillation, usually 50",
        )
    if not 1 <= steps <= original:
        raise BadInput(
            f"{steps} steps of solver {options.name!r}; allowed is 1 to {original}, the steps of the chain it was "
            "distilled on",
            hint=f"ask for 1 to {original} steps, e.g. --steps 4, or set original_steps",
        )
    chain = np.arange(original, 0, -1, dtype=np.float64) * (train_steps // original) - 1
    return chain[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)]


def _coefficients(grid: Grid, options: SolverOptions) -> Coefficients:
    """``x' = a' (c_out D + c_skip x) + s' z`` with the boundary scalings of consistency models (arXiv 2303.01469).

    The scalings do not add up to the signal level except in the limit, so the mean is not kept exactly.
    """
    assert options.timestep_scaling is not None
    scaled = grid.t * options.timestep_scaling
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / np.hypot(scaled, _SIGMA_DATA)
    return Coefficients(
        A=grid.a[1:] * c_skip, B=grid.a[1:] * c_out, S=grid.s[1:], keeps_mean=False, keeps_variance=False
    )


LCM = Solver(
    name="lcm",
    summary="few steps of a latent consistency model",
    space="vp",
    defaults={"original_steps": 50, "timestep_scaling": 10.0},
    coefficients=_coefficients,
    from_zero_signal=True,
    timesteps=chain_timesteps,
)
