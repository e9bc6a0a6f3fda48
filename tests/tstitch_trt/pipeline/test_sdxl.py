"""Whole SDXL pipelines on our runtime against diffusers' own: a pair with a pruned UNet, and base with refiner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.compare import relative_error
from support.diffusers_pipelines import LATENTS, NEGATIVE, PROMPTS, bundle, sdxl_pipeline

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative, on latents
CALL = {"num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}
ASK = {"steps": 8, "guidance": 5.0}
KINDS = {"small": "xl-least", "large": "xl-one"}

Loaded = tuple[Any, Any, tstitch_trt.Runtime]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp("sdxl")
    # With the VAE of Stable Diffusion's pipelines, which is exported already.
    small, large = (sdxl_pipeline(folder / name, kind, 0.18215) for name, kind in KINDS.items())
    made = bundle("sdxl-ssd1b", folder, members={"small": folder / "small", "large": folder / "large"})
    with tstitch_trt.load(made) as runtime:
        yield small, large, runtime


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp("refiner")
    base, refiner = sdxl_pipeline(folder / "base"), sdxl_pipeline(folder / "refiner", "refiner")
    made = bundle("sdxl-base-refiner", folder, members={"base": folder / "base", "refiner": folder / "refiner"})
    with tstitch_trt.load(made) as runtime:
        yield base, refiner, runtime


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_one_member_alone_is_its_pipeline(pair: Loaded, fraction: float, negative: str | None) -> None:
    small, large, runtime = pair
    want = (large if fraction == 0 else small)(
        prompt=PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        latents=LATENTS(),
        height=64,
        width=96,
        original_size=(700, 500),
        crops_coords_top_left=(3, 4),
        **CALL,
    ).images.numpy()
    got = runtime.sample(
        prompt=PROMPTS,
        negative_prompt=negative,
        latents=LATENTS().numpy(),
        fraction=fraction,
        original_size=(700, 500),
        crop=(3, 4),
        **ASK,
    )
    assert got.plan.solver.name == "euler"
    assert relative_error(got.latents, want) < LIMIT


def test_stitched_is_one_pipeline_whose_unet_is_swapped(pair: Loaded) -> None:
    small, large, runtime = pair
    got = runtime.sample(prompt=PROMPTS, negative_prompt=NEGATIVE, latents=LATENTS().numpy(), fraction=0.4, **ASK)
    early = got.schedule.names.count("small")
    assert 0 < early < 8
    kept = large.unet

    def swap(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == early:
            pipe.unet = kept
        return {}

    large.unet = small.unet
    try:
        want = large(
            prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=LATENTS(), height=64, width=96,
            callback_on_step_end=swap, **CALL,
        ).images.numpy()  # fmt: skip
    finally:
        large.unet = kept
    assert relative_error(got.latents, want) < LIMIT


def test_pictures(pair: Loaded) -> None:
    _, large, runtime = pair
    want = large(prompt=PROMPTS, latents=LATENTS(), height=64, width=96, **{**CALL, "output_type": "np"}).images
    got = runtime.sample(prompt=PROMPTS, latents=LATENTS().numpy(), fraction=0.0, **ASK)
    assert got.images is not None
    assert abs(got.images.astype(int) - np.rint(want * 255)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("end", [0.5, 0.8])
def test_base_and_refiner(refined: Loaded, end: float) -> None:
    base, refiner, runtime = refined
    assert runtime.manifest.members["base"].multiples == {"H": 2, "W": 2}
    common = {"prompt": PROMPTS, "negative_prompt": [NEGATIVE] * 2, **CALL}
    half = base(latents=LATENTS(), height=64, width=96, denoising_end=end, **common).images
    want = refiner(image=half, denoising_start=end, **common).images.numpy()
    got = runtime.sample(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        latents=LATENTS().numpy(),
        schedule=f"base@end={end},refiner",
        **ASK,
    )
    assert set(got.schedule.names) == {"base", "refiner"}
    assert relative_error(got.latents, want) < LIMIT
