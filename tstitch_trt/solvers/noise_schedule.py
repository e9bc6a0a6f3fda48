"""The forward process of a model: the noise level of each training timestep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.bundle.noise import alphas_cumprod
from tstitch_engines.errors import BadInput

__all__ = ["NoiseSchedule", "signal_and_noise"]

Array = NDArray[np.float64]

# The signal that solvers in log sigma have in place of none at all, as diffusers does
_LEAST = 2.0**-24


def signal_and_noise(sigma: ArrayLike) -> tuple[Array, Array]:
    """``(a, s)`` with ``a^2 + s^2 = 1`` and ``s / a = sigma``; sigma may be infinite, where ``a = 0``."""
    sigma = np.asarray(sigma, np.float64)
    a = np.asarray(1 / np.hypot(1.0, sigma))
    with np.errstate(invalid="ignore"):
        return a, np.where(np.isinf(sigma), 1.0, a * sigma)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """``x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) eps`` for ``t = 0 .. T-1``.

    ``alphas_cumprod`` float64 ``[T]``, strictly falling inside (0, 1); the last one may be 0 (zero terminal SNR).
    Raises ``BadInput`` for anything else.
    """

    alphas_cumprod: Array

    def __post_init__(self) -> None:
        values = np.array(self.alphas_cumprod, dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise BadInput(
                f"alphas_cumprod has shape {values.shape}; allowed is one value for each training timestep",
                hint="pass a one-dimensional array, or use NoiseSchedule.from_spec",
            )
        falls = np.diff(values) < 0
        falls[-1:] |= values[-1] == _LEAST  # it stands for 0, whatever is before it
        if not (np.isfinite(values).all() and values[-1] >= 0 and 0 < values[0] < 1 and falls.all()):
            raise BadInput(
                f"alphas_cumprod runs from {values[0]:.6g} to {values[-1]:.6g} and is not a noise schedule; "
                "allowed are finite values that fall strictly inside (0, 1), the last one may be 0",
                hint="check beta_start, beta_end and steps of the manifest's noise record",
            )
        values.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", values)

    @staticmethod
    def from_spec(spec: NoiseScheduleSpec) -> NoiseSchedule:
        """The schedule of a manifest."""
        return NoiseSchedule(alphas_cumprod(spec))

    def with_signal(self) -> NoiseSchedule:
        """A last level of ``alphas_cumprod = 2**-24`` (sigma 4096) instead of 0; else unchanged.

        That may be above the level before it, as with ``linear``: there diffusers has the same.
        """
        if self.alphas_cumprod[-1] > 0:
            return self
        return NoiseSchedule(np.append(self.alphas_cumprod[:-1], _LEAST))

    @property
    def steps(self) -> int:
        """``T``, the number of training timesteps."""
        return int(self.alphas_cumprod.size)

    @property
    def sigmas(self) -> Array:
        """Noise over signal ``sqrt(1 - abar) / sqrt(abar)``, float64 ``[T]``, strictly rising; the last one may be
        infinite."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod))

    def sigma_at(self, t: ArrayLike, *, interpolation: str = "log") -> Array:
        """The sigma of timesteps in ``[0, T-1]``; between whole ones log sigma (``linear``: sigma) is interpolated."""
        points, grid = np.asarray(t, np.float64), np.arange(self.steps)
        if interpolation == "linear":
            return np.asarray(np.interp(points, grid, self.sigmas))
        sigmas = self.sigmas
        # exp(log(sigma)) may miss the ends by a rounding, and sigma-min must not lie above timestep 0
        return np.asarray(np.exp(np.interp(points, grid, np.log(sigmas))).clip(sigmas[0], sigmas.max()))

    def timestep_of(self, sigma: ArrayLike) -> Array:
        """The fractional timestep of a sigma, the inverse of ``sigma_at``; clipped to ``[0, T-1]``."""
        sigma, last = np.asarray(sigma, np.float64), self.steps - 1
        rising = np.log(np.maximum.accumulate(self.sigmas))
        return np.where(sigma >= self.sigmas[-1], last, np.interp(np.log(sigma), rising, np.arange(self.steps)))
