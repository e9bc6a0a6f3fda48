"""The noise schedule of a checkpoint, read from the buffers that latent diffusion's own code stores. No torch."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.bundle.noise import alphas_cumprod
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import Checkpoint
from tstitch_export.checkpoint.conventions import say

__all__ = ["betas_of", "noise_from_buffers", "noise_of"]

_MOST: Final = 100_000  # timesteps
_ROUNDED: Final = 1e-2  # of a published schedule in bfloat16; they are ten times as far apart
_EXACT: Final = 2e-3  # of a schedule whose ends are read from the betas: half precision
_NO_SIGNAL: Final = 1e-6  # of abar; the smallest of a published schedule is 4e-5
# Stable Diffusion's, DiT's and the class-conditional latent diffusion models'
_PUBLISHED: Final = (
    NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012),
    NoiseScheduleSpec(kind="linear", beta_start=1e-4, beta_end=0.02),
    NoiseScheduleSpec(kind="scaled-linear", beta_start=0.0015, beta_end=0.0195),
    NoiseScheduleSpec(kind="squared-cosine"),
)

Array = NDArray[np.float64]


def noise_from_buffers(checkpoint: Checkpoint) -> NoiseScheduleSpec | None:
    """The schedule of ``betas``, ``alphas_cumprod`` or ``denoiser.sigmas``; ``None`` where there is none of them.

    Raises ``BadCheckpoint`` where they follow no known formula.
    """
    name, abar = checkpoint.path.name, _falling(_series(checkpoint, "alphas_cumprod"))
    if (betas := _series(checkpoint, "betas")) is not None:
        found = noise_of(betas, name)
        rescaled = abar is not None and len(abar) == len(betas) and abar[-1] < _NO_SIGNAL
        # Programs that rescale the one buffer leave the betas that it was made from.
        return _with(found, zero_terminal_snr=True) if rescaled and found.kind != "squared-cosine" else found
    if abar is None and (sigmas := _series(checkpoint, "denoiser.sigmas")) is not None:  # SDXL's own code, either order
        abar = _falling(1 / (1 + np.sort(sigmas) ** 2))
    return None if abar is None else noise_of(1 - abar / np.concatenate([[1.0], abar[:-1]]), name)


def noise_of(betas: Array, name: str) -> NoiseScheduleSpec:
    """The formula behind ``betas``, which may have been rounded to half precision; ``name`` is the file's.

    Raises ``BadCheckpoint`` where they follow none that is known.
    """
    steps = len(betas)
    for spec in _PUBLISHED:
        for zero in (False, True)[: min(steps, 2)]:
            candidate = _with(spec, steps=steps, zero_terminal_snr=zero)
            if _close(betas_of(candidate), betas, _ROUNDED):
                return candidate
    start, end = (float(f"{beta:.6g}") for beta in (betas[0], betas[-1]))
    if 0 < start <= end < 1:
        for kind in ("scaled-linear", "linear"):
            spec = NoiseScheduleSpec(kind=kind, steps=steps, beta_start=start, beta_end=end)
            if _close(betas_of(spec), betas, _EXACT):
                return spec
    raise BadCheckpoint(
        f"{name}: its betas, {start:g} to {end:g} over {steps} steps, are neither linear, scaled-linear nor "
        "squared-cosine",
        hint=f"if another program than its training wrote them, {say('noise', 'scaled-linear:0.00085:0.012')}",
    )


def _series(checkpoint: Checkpoint, name: str) -> Array | None:
    """The buffer ``name``, where it is a list of numbers."""
    shape = checkpoint.shapes.get(name, checkpoint.outside.get(name))
    if shape is None or len(shape) != 1 or shape[0] > _MOST:
        return None
    found = checkpoint.values(name)
    return found if np.isfinite(found).all() else None


def _falling(abar: Array | None) -> Array | None:
    """``abar`` where it can be one at all."""
    if abar is None or len(abar) < 2 or not (0.5 < abar[0] <= 1 and abar[-1] >= 0 and (np.diff(abar) < 0).all()):
        return None
    return abar


def _close(made: Array, betas: Array, tolerance: float) -> bool:
    return bool((np.abs(made - betas) <= tolerance * np.abs(betas)).all())


def _with(spec: NoiseScheduleSpec, **changes: Any) -> NoiseScheduleSpec:
    return msgspec.structs.replace(spec, **changes)


def betas_of(spec: NoiseScheduleSpec) -> Array:
    """The betas of the schedule, float64 ``[steps]``."""
    abar = alphas_cumprod(spec)
    return np.asarray(1 - abar / np.append(1.0, abar[:-1]))
