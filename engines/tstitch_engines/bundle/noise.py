"""The forward process that a ``NoiseScheduleSpec`` stands for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.errors import unknown_name

__all__ = ["NOISE_KINDS", "alphas_cumprod"]

Array = NDArray[np.float64]

_MAX_BETA = 0.999  # arXiv 2102.09672, section 3.2: keeps the last steps of the cosine schedule from being singular


def _squared_cosine(spec: NoiseScheduleSpec) -> Array:
    edges = np.arange(spec.steps + 1) / spec.steps
    signal = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1 - signal[1:] / signal[:-1], _MAX_BETA), np.float64)


_BETAS: dict[str, Callable[[NoiseScheduleSpec], Array]] = {
    "linear": lambda spec: np.linspace(spec.beta_start, spec.beta_end, spec.steps),
    "scaled-linear": lambda spec: np.linspace(math.sqrt(spec.beta_start), math.sqrt(spec.beta_end), spec.steps) ** 2,
    "squared-cosine": _squared_cosine,
    "betas": lambda spec: np.array(spec.betas),
}
NOISE_KINDS = tuple(_BETAS)


def alphas_cumprod(spec: NoiseScheduleSpec) -> Array:
    """float64 ``[steps]``. Linear: arXiv 2006.11239, section 4; scaled-linear: latent diffusion, linear in the square
    root of beta; squared-cosine: arXiv 2102.09672, eq. 17; betas: as given. With zero terminal SNR (arXiv 2305.08891,
    algorithm 1) its square root is shifted to end at 0 and scaled to begin as before. Raises ``UnknownName``."""
    make = _BETAS.get(spec.kind)
    if make is None:
        raise unknown_name("noise schedule", spec.kind, NOISE_KINDS)
    plain = np.cumprod(1 - make(spec), dtype=np.float64)
    if not spec.zero_terminal_snr:
        return plain
    signal = np.sqrt(plain)
    with np.errstate(invalid="ignore", divide="ignore"):  # betas too small to leave a mark, which are refused later
        return np.asarray(((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2)
