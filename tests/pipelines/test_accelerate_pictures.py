"""``tstitch_trt.accelerate`` with pipelines that start from, paint into or follow a picture: equal to diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accelerating import SD, equal, fast, mask, pictures, pipeline
from tiny_families import unet_folder, vae_folder
from tiny_pipelines import noise
from tstitch_engines.errors import BadInput

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
    before = len(list(cache.glob("*.bundle")))
    with fast(pipe, sd, cache) as made:
        equal(pipe, made, **{**asked, "image": pictures(1, 2)[: asked.get("image", 2)]})
    with fast(pipeline(sd), sd, cache):
        assert len(list(cache.glob("*.bundle"))) == max(before, 1)  # one bundle serves both pipelines


def test_pictures_that_do_not_come_out_even(sd: Path, cache: Path) -> None:
    with fast(pipeline(sd, "ddim", "StableDiffusionImg2ImgPipeline"), sd, cache) as made:
        with pytest.raises(BadInput, match="3 images for 2 pictures; allowed is one, or a number that divides 2"):
            made(**SD, image=pictures(1, 2, 3))
        with pytest.raises(BadInput, match="image is missing"):
            made(**SD)
        with pytest.raises(BadInput, match=r"strength should in \[0.0, 1.0\] but is 1.5"):
            made(**SD, image=pictures(1), strength=1.5)


def test_a_tiny_autoencoder_draws_nothing(sd: Path, cache: Path, tmp_path: Path) -> None:
    """So that the noise of equal generators is equal."""
    vae = vae_folder(tmp_path / "vae", "tiny", levels=4)
    pipe = pipeline(sd, "ddim", "StableDiffusionImg2ImgPipeline", vae=vae)
    with fast(pipe, sd, cache) as made:
        equal(pipe, made, image=pictures(1, 2), strength=0.6)


@pytest.mark.parametrize("asked", [{"strength": 0.6}, {"strength": 1.0}, {"strength": 0.6, "seeds": [4, 9]},
                                   {"latents": 7}], ids=lambda asked: ", ".join(asked))  # fmt: skip
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(sd: Path, cache: Path, channels: int, asked: dict[str, Any]) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    more: dict[str, Any] = {}
    if channels == 9:
        folder = cache.parent / "inpainting"
        if not folder.exists():
            unet_folder(folder, "sd", part=None, seed=8, in_channels=9)
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
