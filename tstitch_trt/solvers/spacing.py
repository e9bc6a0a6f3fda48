"""The noise levels of a trajectory: timestep spacings and sigma spacings, from noisy to clean."""

from __future__ import annotations

from itertools import accumulate, repeat

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput, unknown_name

__all__ = ["SIGMA_SPACINGS", "SPACINGS", "check_timesteps", "space_sigmas", "space_timesteps"]

Array = NDArray[np.float64]

SPACINGS = ("dit", "leading", "linspace", "trailing", "uniform")
SIGMA_SPACINGS = ("karras", "exponential")
_RHO = 7.0  # arXiv 2206.00364, table 1


def space_timesteps(
    spacing: str,
    steps: int,
    *,
    train_steps: int,
    steps_offset: int = 0,
    extra_point: bool = False,
    rounded: bool = True,
) -> Array:
    """``steps`` timesteps in ``[0, train_steps - 1]``, strictly falling, float64 ``[N]``.

    ``leading``, ``linspace`` and ``trailing`` are those of arXiv 2305.08891, table 2, as diffusers has them; ``dit`` is
    the respacing of the published DiT and Improved DDPM samplers: whole timesteps a fractional stride apart.
    ``uniform`` is ``linspace`` without rounding, DPM-Solver's own "time uniform".

    ``steps_offset`` shifts ``leading``. With ``extra_point``, all but ``trailing`` and ``dit`` are laid out for one
    step more, whose timestep (0) is dropped, as diffusers' DPM-Solver has it. ``rounded=False`` keeps ``linspace``
    fractional, as diffusers' Euler has it. A single step of ``linspace`` or ``dit`` starts at the noisy end; the
    published code starts at 0, where there is nothing to denoise.

    Raises ``UnknownName``, or ``BadInput`` when that many distinct timesteps don't fit.
    """
    if spacing not in SPACINGS:
        raise unknown_name("spacing", spacing, SPACINGS)
    last = train_steps - 1
    points = steps + 1 if extra_point and spacing in ("leading", "linspace", "uniform") else steps
    if steps < 1 or points > train_steps:
        most = train_steps - (points - steps)
        raise BadInput(
            f"{steps} steps of spacing {spacing!r} on a noise schedule of {train_steps} timesteps; "
            f"allowed is 1 to {most}",
            hint=f"ask for 1 to {most} steps, e.g. --steps {min(50, most)}",
        )
    if spacing == "trailing":
        # Counted down as the published code does, so that ties round alike; it has one too many at some step counts.
        return np.round(np.arange(train_steps, 0, -train_steps / steps)[:steps]) - 1
    if spacing == "leading":
        t = np.arange(points, dtype=np.float64) * (train_steps // points) + steps_offset
        if t[-1] > last:
            most = last - int(t[-1] - steps_offset)
            raise BadInput(
                f"steps_offset {steps_offset} moves the first of {steps} timesteps to {t[-1]:.0f}; "
                f"the noise schedule ends at {last}, allowed is 0 to {most}",
                hint=f"use a steps_offset of 0 to {most}, or fewer steps",
            )
    elif points == 1:
        t = np.array([float(last)])
    elif spacing in ("linspace", "uniform"):
        t = np.linspace(0, last, points)
        t = np.round(t) if rounded and spacing == "linspace" else t
    else:  # sums the stride as the published code does, so that ties round alike
        t = np.round(list(accumulate(repeat(last / (points - 1), points - 1), initial=0.0)))
    return np.ascontiguousarray(t[::-1][:steps])


def space_sigmas(spacing: str, steps: int, *, sigma_min: float, sigma_max: float) -> Array:
    """``steps`` sigmas from ``sigma_max`` to ``sigma_min``, float64 ``[N]``.

    ``karras``: equal steps of ``sigma ** (1/7)`` (arXiv 2206.00364, eq. 5); ``exponential``: equal steps of log sigma.
    One step is at ``sigma_max``. Raises ``UnknownName`` or ``BadInput``.
    """
    if spacing not in SIGMA_SPACINGS:
        raise unknown_name("sigma spacing", spacing, SIGMA_SPACINGS)
    if steps == 1 and 0 < sigma_max < np.inf:
        return np.array([float(sigma_max)])
    if steps < 1 or not 0 < sigma_min < sigma_max < np.inf:
        raise BadInput(
            f"{steps} sigmas from {sigma_max} to {sigma_min}; allowed are 1 or more with 0 < sigma_min < sigma_max",
            hint="leave sigma_min and sigma_max out to use the range of the noise schedule",
        )
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        high, low = sigma_max ** (1 / _RHO), sigma_min ** (1 / _RHO)
        sigmas = (high + ramp * (low - high)) ** _RHO
    else:
        sigmas = np.exp(np.log(sigma_max) + ramp * (np.log(sigma_min) - np.log(sigma_max)))
    sigmas[0] = sigma_max  # exact ends: rounding must not carry them outside the noise schedule
    if steps > 1:
        sigmas[-1] = sigma_min
    return np.asarray(sigmas)


def check_timesteps(timesteps: Array, *, train_steps: int) -> Array:
    """Given timesteps, which may be fractional, as float64 ``[N]``. Raises ``BadInput``."""
    t = np.array(timesteps, dtype=np.float64)
    if t.ndim != 1 or t.size == 0 or not np.isfinite(t).all():
        raise BadInput(
            f"timesteps of shape {t.shape} are not a list of finite numbers",
            hint="write them from noisy to clean, e.g. timesteps=[999, 749, 499, 249]",
        )
    wrong = t[(t < 0) | (t > train_steps - 1)]
    if wrong.size:
        raise BadInput(
            f"timestep {wrong[0]:g} is outside the noise schedule; allowed is 0 to {train_steps - 1}",
            hint="keep every timestep inside the range the models were trained on",
        )
    rises = np.flatnonzero(np.diff(t) >= 0)
    if rises.size:
        raise BadInput(
            f"timesteps must fall, but {t[rises[0]]:g} is followed by {t[rises[0] + 1]:g}",
            hint="order them from noisy to clean, each one once",
        )
    return t
