"""What pictures of every mode, type and rank are: the pipeline's own processors are the oracle, as far as they go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from support.tiny_pipelines import picture
from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.inputs import control_picture, mask_and_picture, start_picture


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The processors as the pipelines make them."""
    from diffusers.image_processor import VaeImageProcessor

    return SimpleNamespace(
        image_processor=VaeImageProcessor(vae_scale_factor=8),
        mask_processor=VaeImageProcessor(
            vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        ),
        control_image_processor=VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False),
    )


def pil(mode: str) -> Any:
    from PIL import Image

    if mode == "I;16":
        return Image.fromarray((picture()[..., 0].astype(np.uint16) + 1) * 200)
    return Image.fromarray(picture()).convert(mode)


FLOATS = picture().astype(np.float32) / 255
GREY = FLOATS[..., :1]
RGBA = np.concatenate([FLOATS, GREY], axis=-1)
CHANNELS_FIRST = torch.from_numpy(FLOATS).permute(2, 0, 1)
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

READ: dict[str, Any] = {
    "PIL RGB": pil("RGB"),
    "PIL pictures of two sizes": [pil("RGB"), pil("RGB").resize((32, 48))],
    "array HW3": FLOATS,
    "array 1HW3": FLOATS[None],
    "arrays": [FLOATS, FLOATS],
    "arrays of rank 4": [FLOATS[None], FLOATS[None]],
    "tensor 3HW": CHANNELS_FIRST,
    "tensor 13HW": CHANNELS_FIRST[None],
    "tensors": [CHANNELS_FIRST, CHANNELS_FIRST],
}
LATENT: dict[str, Any] = {"latents": LATENTS, "latents without N": LATENTS[0], "list of latents": [LATENTS[0]] * 2}


@pytest.mark.filterwarnings("ignore:Passing `image`:FutureWarning")
@pytest.mark.parametrize("what", [*READ, *LATENT])
def test_pictures_and_latents_are_read_as_the_pipeline_reads_them(pipe: Any, what: str) -> None:
    given = {**READ, **LATENT}[what]
    found = start_picture(pipe, given, 64, 64, 4)
    assert found.shape[1:] == ((4, 8, 8) if what in LATENT else (3, 64, 64))
    assert torch.equal(found, pipe.image_processor.preprocess(given, height=64, width=64))


REFUSED: dict[str, tuple[Any, str]] = {
    "PIL RGBA": (pil("RGBA"), r"image has 4 channels \(mode RGBA\); allowed are 3 \(red, green, blue\), and latents"),
    "PIL LA": (pil("LA"), r"2 channels \(mode LA\)"),
    "PIL L": (pil("L"), r"1 channel \(mode L\)"),
    "PIL P": (pil("P"), r"1 channel \(mode P\)"),
    "PIL 1": (pil("1"), r"1 channel \(mode 1\)"),
    "PIL CMYK": (pil("CMYK"), r"4 channels \(mode CMYK\)"),
    "PIL of 16 bits": (pil("I;16"), r"1 channel \(mode I;16\)"),
    "PIL pictures of two modes": ([pil("RGB"), pil("RGBA")], "which the pipeline can't read"),
    "array HW": (FLOATS[..., 0], "1 channel"),
    "array HW1": (GREY, "1 channel"),
    "array HW4": (RGBA, "4 channels"),
    "array 1HW4": (RGBA[None], "4 channels"),
    "array of latents": (LATENTS.abs().numpy(), "8 channels"),
    "array of whole numbers": (picture(), "has values of 509 once the pipeline has read it; allowed is at most 1"),
    "arrays of two sizes": ([FLOATS, FLOATS[:32]], "which the pipeline can't read"),
    "tensor HW": (CHANNELS_FIRST[0], "which the pipeline can't read"),
    "tensor 11HW": (CHANNELS_FIRST[None, :1], "1 channel"),
    "tensor of rank 5": (CHANNELS_FIRST[None, None], "which the pipeline can't read"),
    "nothing": ([], "which the pipeline can't read"),
    "numbers": ([1, 2], "which the pipeline can't read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_channels_are_refused(pipe: Any, what: str) -> None:
    given, message = REFUSED[what]
    with pytest.raises(BadInput, match=message):
        start_picture(pipe, given, 64, 64, 4)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "CMYK"])
def test_control_and_masks_of_every_mode_are_read_as_the_pipeline_reads_them(pipe: Any, mode: str) -> None:
    """Its processors convert these."""
    want = pipe.control_image_processor.preprocess(pil(mode), height=64, width=64)
    np.testing.assert_array_equal(control_picture(pipe, pil(mode), 64, 64, 1), want.numpy())
    want = pipe.mask_processor.preprocess(pil(mode), height=64, width=64)
    found, _ = mask_and_picture(pipe, pil(mode), CHANNELS_FIRST[None], 64, 64)
    np.testing.assert_array_equal(found, want[:, 0].numpy())


@pytest.mark.parametrize("given", [GREY, RGBA, LATENTS, picture()], ids=["grey", "RGBA", "latents", "whole numbers"])
def test_arrays_of_other_channels_are_no_control(pipe: Any, given: Any) -> None:
    with pytest.raises(BadInput, match="the control picture has"):
        control_picture(pipe, given, 64, 64, 1)


@pytest.mark.parametrize("given", [FLOATS[None], LATENTS], ids=["RGB", "latents"])
def test_arrays_of_several_channels_are_no_mask(pipe: Any, given: Any) -> None:
    with pytest.raises(BadInput, match=r"mask_image has [34] channels; allowed is 1"):
        mask_and_picture(pipe, given, CHANNELS_FIRST[None], 64, 64)
