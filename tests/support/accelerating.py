"""Diffusers pipelines as ``tstitch_trt.accelerate`` takes them, and the call that the tests make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support.compare import relative_error
from support.tiny_pipelines import PIXELS, picture, scheduler

__all__ = ["LIMIT", "SD", "equal", "fast", "mask", "pictures", "pipeline", "seeded"]

LIMIT = 1e-3  # relative, on latents

SD: dict[str, Any] = {
    "prompt": ["a photo of a cat", "the horse on mars"],
    "negative_prompt": ["blurry", "ugly"],
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
}


def pipeline(sd: Path, solver: str = "pndm", cls: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    """The pipeline in ``sd/large``, as the class ``cls`` of diffusers with this scheduler and these ``parts``."""
    import diffusers

    if "XL" not in cls:
        parts = {"safety_checker": None, **parts}
    pipe = getattr(diffusers, cls).from_pretrained(sd / "large", scheduler=scheduler(solver), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fast(pipe: Any, sd: Path, cache: Path | None, **more: Any) -> Any:
    """``pipe`` with the small UNet in ``sd``, for pictures of 64 x 64 pixels."""
    import tstitch_trt

    asked = {
        "small": sd / "small",
        "cache": cache,
        "batch": "1:2:4",
        "height": PIXELS,
        "width": PIXELS,
        "threads": 1,
        **more,
    }
    return tstitch_trt.accelerate(pipe, **asked)


def seeded(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def pictures(*seeds: int) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(picture(seed)) for seed in seeds]


def mask() -> Any:
    from PIL import Image

    found = np.zeros((PIXELS, PIXELS), np.uint8)
    found[16:40, 8:56] = 255
    return Image.fromarray(found)


def equal(pipe: Any, made: Any, *, seeds: int | list[int] = 1, fraction: float = 0.0, **asked: Any) -> Any:
    """The latents of both, from equal generators; ours."""
    found = []
    for call, more in ((pipe, {}), (made, {"fraction": fraction})):
        generator = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
        found.append(call(**{**SD, **asked}, **more, generator=generator, output_type="latent").images.numpy())
    assert relative_error(found[1], found[0]) < LIMIT
    return found[1]
