"""What diffusers' pipelines are compared on: schedulers as published, noise, pictures, and a stitched loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PIXELS",
    "SCHEDULERS",
    "Picture",
    "noise",
    "picture",
    "scheduler",
    "stitched",
]

Picture = NDArray[np.uint8]

PIXELS = 64
_TRAINED: Mapping[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_OFFSET: Mapping[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1}

# As published pipelines configure them
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pndm": ("PNDMScheduler", {**_OFFSET, "skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddim": ("DDIMScheduler", {**_OFFSET, "clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", _OFFSET),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", _OFFSET),
    "dpmpp-2m karras": ("DPMSolverMultistepScheduler", {**_OFFSET, "use_karras_sigmas": True}),
    "dpmpp-2m linspace karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp-2m exponential": ("DPMSolverMultistepScheduler", {**_OFFSET, "use_exponential_sigmas": True}),
    "euler linspace karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", _OFFSET),
    "unipc karras": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
    "turbo": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "tcd": ("TCDScheduler", {}),
    "lcm": ("LCMScheduler", {"original_inference_steps": 50, "steps_offset": 1}),
}


def scheduler(name: str, **changes: Any) -> Any:
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind)(**{**_TRAINED, **settings, **changes})


def noise(count: int = 1, seed: int = 0, side: int = PIXELS // 8) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, 4, side, side), np.float32)


def picture(seed: int = 0, size: tuple[int, int] = (PIXELS, PIXELS)) -> Picture:
    """Smooth colours, as pictures are, uint8 ``[H,W,3]``."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]] / 10.0
    waves = np.stack([np.sin(rows + seed), np.cos(columns + rows / 3), np.sin(columns - rows)], axis=-1)
    return np.asarray(127.5 * (1 + waves)).astype(np.uint8)


def stitched(
    schedule: Any,
    unets: Sequence[Any],
    latents: NDArray[np.float32],
    steps: int,
    guidance: float,
    inputs: Callable[[Any], tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> NDArray[np.float32]:
    """T-Stitch in a plain loop over diffusers' modules: ``unets`` has one for every step, ``inputs`` gives each both
    halves' keywords, the unconditional first."""
    import torch

    schedule.set_timesteps(steps)
    assert len(schedule.timesteps) == len(unets)
    x = torch.from_numpy(latents) * schedule.init_noise_sigma
    with torch.inference_mode():
        for unet, t in zip(unets, schedule.timesteps, strict=True):
            seen = schedule.scale_model_input(x, t)
            u, c = (unet(seen, t, **given, return_dict=False)[0] for given in inputs(unet))
            x = schedule.step(u + guidance * (c - u), t, x, return_dict=False)[0]
    found: NDArray[np.float32] = x.numpy()
    return found
