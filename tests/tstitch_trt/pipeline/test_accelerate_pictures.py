"""``tstitch_trt.accelerate`` with pipelines that start from, paint into or follow a picture: equal to diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.accelerating import LIMIT, SD, equal, fast, mask, pictures, pipeline, seeded
from support.compare import relative_error
from support.tiny_families import controlnet_folder, unet_folder, vae_folder
from support.tiny_pipelines import noise
from tstitch_engines.errors import BadInput, PairMismatch

pytestmark = [
    # diffusers hands numpy its tensors in a way that newer versions of numpy warn of
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed:FutureWarning"),
]


@pytest.mark.parametrize(
    "asked",
    [
        {"strength": 0.5},
        {"strength": 1.0},
        {"strength": 0.7, "num_images_per_prompt": 2},  # diffusers goes round the pictures, and repeats each prompt
        {"strength": 0.7, "seeds": [4, 9]},
        {"strength": 0.7, "seeds": [4, 9], "image": 1},
    ],
    ids=lambda asked: ", ".join(asked),
)
def test_image_to_image(sd: Path, cache: Path, asked: dict[str, Any]) -> None:
    pipe = pipeline(sd, "ddim", "StableDiffusionImg2ImgPipeline")
    with fast(pipe, sd, cache) as made:
        equal(pipe, made, **{**asked, "image": pictures(1, 2)[: asked.get("image", 2)]})
        root = made.runtime.bundle.root
    with fast(pipeline(sd), sd, cache) as other:
        assert other.runtime.bundle.root == root  # one bundle serves both pipelines


def test_pictures_that_do_not_come_out_even(sd: Path, cache: Path) -> None:
    with fast(pipeline(sd, "ddim", "StableDiffusionImg2ImgPipeline"), sd, cache) as made:
        with pytest.raises(BadInput, match="3 images for 2 pictures; allowed is one, or a number that divides 2"):
            made(**SD, image=pictures(1, 2, 3))
        with pytest.raises(BadInput, match="image is missing"):
            made(**SD)
        with pytest.raises(BadInput, match=r"strength is 1.5; allowed is a number from 0 to 1"):
            made(**SD, image=pictures(1), strength=1.5)


@pytest.mark.parametrize("solver", ["pndm", "dpmpp-2m karras", "unipc"])
def test_multistep_solvers_start_from_a_picture_as_in_diffusers(sd: Path, cache: Path, solver: str) -> None:
    """PNDM's pipelines repeat the step that they begin with, though the list of timesteps does not."""
    pipe = pipeline(sd, solver, "StableDiffusionImg2ImgPipeline")
    with fast(pipe, sd, cache) as made:
        for strength in (0.5, 0.9):
            equal(pipe, made, image=pictures(1, 2), strength=strength)


@pytest.mark.slow
def test_a_tiny_autoencoder_draws_nothing(sd: Path, cache: Path, tmp_path: Path) -> None:
    """So that the noise of equal generators is equal."""
    vae = vae_folder(tmp_path / "vae", "tiny", levels=4)
    pipe = pipeline(sd, "ddim", "StableDiffusionImg2ImgPipeline", vae=vae)
    with fast(pipe, sd, cache) as made:
        equal(pipe, made, image=pictures(1, 2), strength=0.6)


@pytest.mark.parametrize("asked", [{"strength": 0.6}, {"strength": 1.0}, {"strength": 0.6, "seeds": [4, 9]},
                                   {"latents": 7}], ids=lambda asked: ", ".join(asked))  # fmt: skip
@pytest.mark.parametrize("channels", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_inpainting(sd: Path, cache: Path, channels: int, asked: dict[str, Any]) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    more: dict[str, Any] = {}
    if channels == 9:
        folder = cache.parent / "inpainting"
        if not folder.exists():
            unet_folder(folder, "least", part=None, seed=8, in_channels=9)
        more["unet"] = UNet2DConditionModel.from_pretrained(folder)
    pipe = pipeline(sd, "ddim", "StableDiffusionInpaintPipeline", **more)
    given = {**asked, "image": pictures(1)[0], "mask_image": mask()}
    if "latents" in asked:
        given["latents"] = torch.from_numpy(noise(2, seed=7))
    with fast(pipe, sd, cache) as made:
        equal(pipe, made, **given)
        if "latents" in asked:
            with pytest.raises(BadInput, match="latents were given beside image"):
                made(**SD, **given, strength=0.5)
            with pytest.raises(BadInput, match="mask_image is missing"):
                made(**SD, **{**given, "mask_image": None})


def test_control(sd: Path, cache: Path, tmp_path: Path) -> None:
    pipe = pipeline(
        sd, "ddim", "StableDiffusionControlNetPipeline", controlnet=controlnet_folder(tmp_path / "c", "one")
    )
    asked = {"image": pictures(3)[0], "controlnet_conditioning_scale": 0.7}
    with fast(pipe, sd, cache, small=pipe.unet) as made:  # one export for both members
        held = equal(pipe, made, fraction=0.4, **asked)
        asked["controlnet_conditioning_scale"] = 0.0
        free = made(**SD, **asked, generator=seeded(1), output_type="latent").images
        assert relative_error(free.numpy(), held) > 10 * LIMIT
        with pytest.raises(BadInput, match="the control picture is missing"):
            made(**SD)
        with pytest.raises(BadInput, match="control_guidance_end was given, which compiled engines can't honour"):
            made(**SD, **asked, control_guidance_end=0.5)
    from diffusers import StableDiffusionControlNetImg2ImgPipeline

    other = StableDiffusionControlNetImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with fast(other, sd, cache, small=other.unet) as made:
        equal(other, made, image=pictures(1, 2), control_image=pictures(3, 4), strength=0.7)


@pytest.mark.slow
def test_a_small_unet_that_the_controlnet_does_not_fit(sd: Path, cache: Path, tmp_path: Path) -> None:
    """It has more blocks than the ControlNet gives residuals for: its steps run without, where that is said."""
    pipe = pipeline(
        sd, "ddim", "StableDiffusionControlNetPipeline", controlnet=controlnet_folder(tmp_path / "c", "one")
    )
    unet_folder(tmp_path / "deep", "one", part=None, seed=6, layers_per_block=2)
    small = tmp_path / "deep"
    with pytest.raises(PairMismatch, match="can't control member 'small'"):
        fast(pipe, sd, cache, small=small)
    with fast(pipe, sd, cache, small=small, options={"small.controlled": False}) as made:
        equal(pipe, made, image=pictures(3)[0])
        asked = {**SD, "image": pictures(3)[0], "output_type": "latent"}
        free, held = (
            made(**asked, controlnet_conditioning_scale=scale, generator=seeded(1), fraction=0.5).images.numpy()
            for scale in (0.0, 1.0)
        )
        assert relative_error(held, free) > 10 * LIMIT  # the large one's steps are steered
        with pytest.raises(BadInput, match="none of the members that run takes control: small"):
            made(**asked, fraction=1.0)
