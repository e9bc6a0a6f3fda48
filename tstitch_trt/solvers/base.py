"""A solver: facts about its grid, and a pure function from the grid to coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.solvers.options import SolverOptions
from tstitch_trt.solvers.table import Coefficients

__all__ = ["Coefficients", "Grid", "Solver", "gaussian", "gaussian_step", "idle_noise"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid:
    """The ``N + 1`` noise levels of a trajectory, the last one at its end.

    ``t`` float64 ``[N]``; ``a`` and ``s`` float64 ``[N+1]``: the latent is ``a x0 + s eps``; ``a[0]`` may be 0. ``age``
    int64 ``[N]``: how many earlier estimates a step may use, 0 at the start and at every restart. ``ends``: ``(a, s)``
    float64 ``[N]`` each at the end of each step, where that is not the beginning of the next one. ``via``: likewise,
    other levels that the steps need (``Solver.via``).
    """

    t: Array
    a: Array
    s: Array
    age: NDArray[np.int64]
    ends: tuple[Array, Array] | None = None
    via: tuple[Array, Array] | None = None

    @property
    def a_to(self) -> Array:
        return self.a[1:] if self.ends is None else self.ends[0]

    @property
    def s_to(self) -> Array:
        return self.s[1:] if self.ends is None else self.ends[1]

    @property
    def steps(self) -> int:
        return int(self.t.size)

    @property
    def ratio(self) -> Array:
        """``sigma' / sigma`` of each step, in ``[0, 1]``: ``exp(-h)`` with ``h`` the step in log signal-to-noise."""
        with np.errstate(divide="ignore"):  # a = 0
            return np.asarray((self.s_to / self.a_to) / (self.s / self.a)[:-1])


def _none_idle(options: SolverOptions) -> Mapping[str, str]:
    return {}


def idle_noise(options: SolverOptions) -> Mapping[str, str]:
    """``s_noise`` of solvers that draw their noise by ``eta``."""
    return {"s_noise": "no noise is drawn with eta=0"} if options.eta == 0 and options.s_noise != 1 else {}


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A named solver. ``defaults`` names every option it understands beside those of the spacing."""

    name: str
    summary: str
    space: Literal["vp", "ve"]  # the latent: variance-preserving (a^2 + s^2 = 1) or exploding (a = 1)
    defaults: Mapping[str, str | int | float | bool]
    coefficients: Callable[[Grid, SolverOptions], Coefficients]
    extra_point: bool = False  # see spacing.space_timesteps
    continuous: bool = False  # linspace stays fractional and sigma is interpolated linearly, as in diffusers' Euler
    from_zero_signal: bool = False  # its steps may begin at a = 0; others begin at 2**-24 instead, as in diffusers
    timesteps: Callable[[SolverOptions, int, int], Array] | None = None  # own spacing: (options, steps, train steps)
    via: Callable[[SolverOptions, Array, int], Array] | None = None  # (options, timesteps, stride) -> others in a step
    final: str = "zero"  # the option ``final`` of solvers that have no other
    evaluations: Callable[[Array], Array] | None = None  # from the timesteps of the steps to those of the rows
    multistep: bool = False  # it reads estimates of earlier steps
    idle: Callable[[SolverOptions], Mapping[str, str]] = _none_idle  # options without effect beside others, and why


def gaussian(grid: Grid, options: SolverOptions) -> Coefficients:
    """``gaussian_step`` with the options ``eta`` (0 where the solver has none) and ``s_noise`` (1)."""
    return gaussian_step(grid, eta=options.eta or 0.0, s_noise=1.0 if options.s_noise is None else options.s_noise)


def gaussian_step(grid: Grid, *, eta: float, s_noise: float = 1.0) -> Coefficients:
    """The exact step of a Gaussian that keeps part of its noise and draws the rest.

    ``x' = a' D + sqrt(s'^2 - std^2) (x - a D)/s + std z`` with ``std = eta s' sqrt(1 - (sigma'/sigma)^2)``: DDIM
    (arXiv 2010.02502, eq. 12 and 16) and, for ``eta = 1``, the posterior of DDPM; on variance-exploding latents the
    Euler step and k-diffusion's ancestral step.
    """
    a, s, a_next, s_next = grid.a[:-1], grid.s[:-1], grid.a_to, grid.s_to
    ratio = grid.ratio
    # 1 - eta^2 (1 - ratio^2), written without cancellation
    kept = s_next * np.sqrt((1 - eta) * (1 + eta) + (eta * ratio) ** 2)
    std = eta * s_next * np.sqrt((1 - ratio) * (1 + ratio))
    return Coefficients(
        A=kept / s, B=a_next - kept / s * a, S=std * s_noise, keeps_variance=s_noise == 1.0 or not std.any()
    )
