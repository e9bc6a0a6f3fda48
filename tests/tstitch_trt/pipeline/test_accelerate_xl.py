"""``tstitch_trt.accelerate`` with SDXL's pipelines, its refiner and latent consistency models: equal to diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.accelerating import LIMIT, SD, equal, fast, mask, pictures, pipeline, seeded
from support.compare import relative_error
from support.diffusers_pipelines import sdxl_pipeline
from support.tiny_families import controlnet_folder, unet_folder
from support.tiny_pipelines import PIXELS, noise, scheduler
from tstitch_engines.errors import BadInput

pytestmark = [
    pytest.mark.slow,
    # diffusers hands numpy its tensors in a way that newer versions of numpy warn of
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed:FutureWarning"),
]

SIDES = {"height": PIXELS, "width": PIXELS}
SIZES = {"crops_coords_top_left": (3, 4), "original_size": (100, 80)}


class Watermark:
    def apply_watermark(self, images: Any) -> Any:
        return images.flip(-1)


def test_sdxl(xl: Path, cache: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipe = pipeline(xl, "euler", "StableDiffusionXLPipeline")
    small = UNet2DConditionModel.from_pretrained(xl / "small")
    asked = {"prompt_2": ["mars", "cinematic"], **SIZES, **SIDES}
    with fast(pipe, xl, cache) as made:
        for more in ({}, {"denoising_end": 0.6}, {"denoising_end": 1.0}, {"negative_prompt": None}):
            equal(pipe, made, **asked, **more)
        want = pipe(**SD, **asked, generator=seeded(1), output_type="np").images
        got = made(**SD, **asked, generator=seeded(1), output_type="np", fraction=0.0)
        assert relative_error(got.images, want) < LIMIT
        pipe.watermark = Watermark()
        want = pipe(**SD, **asked, generator=seeded(1), output_type="np").images
        marked = made(**SD, **asked, generator=seeded(1), output_type="np", fraction=0.0)
        assert relative_error(marked.images, want) < LIMIT < relative_error(marked.images, got.images)
        pipe.watermark = None
        large = pipe.unet
        call = {**SD, **asked, "output_type": "latent"}

        def swap(running: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step + 1 == 2:  # round(0.4 * 6)
                running.unet = large
            return {}

        for fraction, more in ((1.0, {}), (0.4, {"callback_on_step_end": swap})):
            pipe.unet = small
            want = pipe(**call, **more, generator=seeded(1)).images
            pipe.unet = large
            got = made(**call, generator=seeded(1), fraction=fraction).images
            assert relative_error(got.numpy(), want.numpy()) < LIMIT
        embeds = pipe.encode_prompt(SD["prompt"], do_classifier_free_guidance=False)[0]
        with pytest.raises(BadInput, match="prompt_embeds were given without pooled_prompt_embeds"):
            made(prompt_embeds=embeds)
        with pytest.raises(BadInput, match="negative_crops_coords_top_left was given"):
            made(**SD, negative_crops_coords_top_left=(1, 1))


def test_sdxl_from_pictures(xl: Path, cache: Path) -> None:
    """The second one is entered in the middle and left before the end."""
    pipe = pipeline(xl, "euler", "StableDiffusionXLImg2ImgPipeline")
    with fast(pipe, xl, cache) as made:
        equal(pipe, made, image=pictures(1, 2), strength=0.6, num_images_per_prompt=2, **SIZES)
        equal(pipe, made, image=pictures(1, 2), strength=0.8, denoising_end=0.7)
        with pytest.raises(BadInput, match=r"denoising_end 0.3 lies before the first step of strength 0.2"):
            made(**SD, image=pictures(1, 2), strength=0.2, denoising_end=0.3)
    pipe = pipeline(xl, "euler", "StableDiffusionXLInpaintPipeline")
    with fast(pipe, xl, cache) as made:
        for strength in (0.7, 0.9999, 1.0):
            equal(pipe, made, image=pictures(1)[0], mask_image=mask(), strength=strength, **SIDES)


def test_sdxl_with_control(xl: Path, cache: Path, tmp_path: Path) -> None:
    """SSD-1B follows SDXL's ControlNet."""
    from diffusers import StableDiffusionXLControlNetImg2ImgPipeline

    net = controlnet_folder(tmp_path / "c", "sdxl")
    pipe = pipeline(xl, "euler", "StableDiffusionXLControlNetPipeline", controlnet=net)
    with fast(pipe, xl, cache, small=pipe.unet) as made:
        equal(pipe, made, image=pictures(3)[0], controlnet_conditioning_scale=0.6, fraction=0.4, **SIZES)
    other = StableDiffusionXLControlNetImg2ImgPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    with fast(other, xl, cache, small=other.unet) as made:
        equal(other, made, image=pictures(1, 2), control_image=pictures(3, 4), strength=0.7)


def test_a_refiner(cache: Path, tmp_path: Path) -> None:
    refiner = sdxl_pipeline(tmp_path / "large", "refiner")
    asked = {"image": pictures(1, 2), "aesthetic_score": 7.0, "negative_aesthetic_score": 1.5}
    with fast(refiner, tmp_path, cache, small=refiner.unet) as made:
        equal(refiner, made, strength=0.5, **asked)
        import torch

        asked["image"] = torch.from_numpy(noise(2, seed=3))
        for solver in ("dpmpp-2m karras", "pndm", "unipc", "euler"):  # multistep solvers start again, as with strength
            refiner.scheduler = scheduler(solver)
            equal(refiner, made, denoising_start=0.6, **asked)
        equal(refiner, made, denoising_start=0.001, **asked)  # no step is left out, and the latents are not scaled
        with pytest.raises(BadInput, match="denoising_start was given with a picture"):
            made(**SD, image=pictures(1), denoising_start=0.6)
        with pytest.raises(BadInput, match="with an aesthetic score allowed is"):
            made(**SD, image=pictures(1), crops_coords_top_left=(1, 2))


@pytest.mark.parametrize("cls", ["StableDiffusionPipeline", "LatentConsistencyModelPipeline"])
def test_a_distilled_member_is_told_its_guidance(sd: Path, cache: Path, cls: str, monkeypatch: Any) -> None:
    """LCM in four steps, the scale as ``timestep_cond``, one half. What is drawn between the steps is ours, by seeds
    from the generator: diffusers is given the same."""
    import torch
    from diffusers import UNet2DConditionModel, schedulers

    from tstitch_engines.device.host_kernels import normal
    from tstitch_trt.pipeline.inputs import step_noise_seeds

    folder = cache.parent / "distilled"
    if not folder.exists():
        unet_folder(folder, "least", part=None, seed=9, time_cond_proj_dim=16)
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
        assert relative_error(got.numpy(), want.numpy()) < LIMIT
        other = made(**{**asked, "guidance_scale": 2.0}, generator=seeded(1), output_type="latent").images
        assert relative_error(other.numpy(), want.numpy()) > 10 * LIMIT
        if cls.startswith("Latent"):
            made.scheduler = pipeline(sd, "ddim").scheduler
            with pytest.raises(BadInput, match="original_inference_steps was given, and the scheduler is a DDIM"):
                made(**asked)
