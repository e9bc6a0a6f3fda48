"""``tstitch_trt.accelerate`` with SDXL's pipelines, its refiner and latent consistency models: equal to diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelerating import LIMIT, SD, fast, pipeline, seeded
from diffusers_pipelines import relative
from tiny_families import unet_folder
from tiny_pipelines import PIXELS
from tstitch_engines.errors import BadInput

pytestmark = [
    # diffusers hands numpy its tensors in a way that newer versions of numpy warn of
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed:FutureWarning"),
]

SIDES = {"height": PIXELS, "width": PIXELS}
SIZES = {"crops_coords_top_left": (3, 4), "original_size": (100, 80)}


@pytest.mark.parametrize("cls", ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"])
def test_a_distilled_member_is_told_its_guidance(sd: Path, cache: Path, cls: str, monkeypatch: Any) -> None:
    """LCM in four steps, the scale as ``timestep_cond``, one half. What is drawn between the steps is ours, by seeds
    from the generator: diffusers is given the same."""
    import torch
    from diffusers import UNet2DConditionModel, schedulers

    from tstitch_engines.host_kernels import normal
    from tstitch_trt.pipeline_inputs import step_noise_seeds

    folder = cache.parent / "distilled"
    if not folder.exists():
        unet_folder(folder, "sd", part=None, seed=9, time_cond_proj_dim=16)
    unet = UNet2DConditionModel.from_pretrained(folder)
    pipe = pipeline(sd, "lcm", cls, unet=unet)
    asked: dict[str, Any] = {"prompt": SD["prompt"], "num_inference_steps": 4, "guidance_scale": 6.0}
    if cls.startswith("Latent"):
        asked["original_inference_steps"] = 40
    with fast(pipe, sd, cache, small=unet) as made:
        generator = seeded(1)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        seeds = step_noise_seeds(generator, 2)
        drawn = iter(range(4))

        def ours(shape: Any, **_: Any) -> Any:
            step = next(drawn)
            return torch.from_numpy(np.stack([normal(seed, step, 256).reshape(4, 8, 8) for seed in seeds]))

        monkeypatch.setattr(schedulers.scheduling_lcm, "randn_tensor", ours)
        want = pipe(**asked, latents=latents, output_type="latent").images
        assert next(drawn) == 3  # three times
        got = made(**asked, generator=seeded(1), output_type="latent").images
        assert relative(got.numpy(), want.numpy()) < LIMIT
        other = made(**{**asked, "guidance_scale": 2.0}, generator=seeded(1), output_type="latent").images
        assert relative(other.numpy(), want.numpy()) > 10 * LIMIT
        if cls.startswith("Latent"):
            made.scheduler = pipeline(sd, "ddim").scheduler
            with pytest.raises(BadInput, match="original_inference_steps was given, and the scheduler is a DDIM"):
                made(**asked)
