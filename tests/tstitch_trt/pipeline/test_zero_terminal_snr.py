"""Pipelines with zero terminal SNR (``rescale_betas_zero_snr``) and given betas: engines draw what diffusers draws."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.accelerating import LIMIT, SD, equal, fast, mask, pictures, pipeline
from support.compare import relative_error
from support.tiny_pipelines import PIXELS, noise, scheduler
from tstitch_engines.errors import BadInput, BadSchedule
from tstitch_engines.spec import Range
from tstitch_export.build import build

pytestmark = [
    # diffusers hands numpy its tensors in a way that newer versions of numpy warn of
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed:FutureWarning"),
]

ZERO: dict[str, Any] = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}


def zero(sd: Path, cls: str = "StableDiffusionPipeline") -> Any:
    pipe = pipeline(sd, "ddim", cls)
    pipe.scheduler = scheduler("ddim", **ZERO)
    return pipe


@pytest.fixture(scope="module")
def accelerated(sd: Path, cache: Path) -> Iterator[Any]:
    with fast(zero(sd), sd, cache) as made:
        yield made


@pytest.mark.parametrize(
    ("solver", "changes"),
    [
        ("ddim", {}),
        ("ddim", {"timestep_spacing": "leading"}),
        ("ddim", {"timestep_spacing": "linspace"}),
        ("euler", {}),
        ("euler", {"use_karras_sigmas": True}),
        ("dpmpp-2m", {}),
        ("unipc", {}),
    ],
)
def test_equal_to_the_pipeline(accelerated: Any, solver: str, changes: dict[str, Any]) -> None:
    accelerated.scheduler = scheduler(solver, **{**ZERO, **changes})
    assert accelerated.runtime.manifest.noise.zero_terminal_snr
    equal(accelerated.pipe, accelerated, guidance_rescale=0.7)


@pytest.mark.parametrize("solver", ["ddim", "euler"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_from_a_picture(sd: Path, cache: Path, solver: str, strength: float) -> None:
    pipe = zero(sd, "StableDiffusionImg2ImgPipeline")
    with fast(pipe, sd, cache) as made:
        pipe.scheduler = scheduler(solver, **ZERO)
        equal(pipe, made, image=pictures(1, 2), strength=strength)


def test_painting_and_timesteps_one_by_one(sd: Path, cache: Path) -> None:
    pipe = zero(sd, "StableDiffusionInpaintPipeline")
    with fast(pipe, sd, cache) as made:
        pipe.scheduler = scheduler("euler", **{**ZERO, "timestep_spacing": "leading"})
        equal(pipe, made, image=pictures(1)[0], mask_image=mask(), strength=1.0)
    pipe = zero(sd)
    with fast(pipe, sd, cache) as made:
        pipe.scheduler = scheduler("euler", **{**ZERO, "timestep_spacing": "leading"})
        equal(pipe, made, timesteps=[999, 749, 499, 249], num_inference_steps=None)


def test_a_scheduler_with_signal_is_for_another_bundle(accelerated: Any) -> None:
    accelerated.scheduler = scheduler("ddim", **{**ZERO, "rescale_betas_zero_snr": False})
    with pytest.raises(BadInput, match=r"the bundle is for v and .*, zero terminal SNR"):
        accelerated(**SD)


def test_pndm_does_not_rescale(sd: Path, cache: Path) -> None:
    """diffusers carries the key along and ignores it; such a pipeline has a bundle of its own."""
    from diffusers import PNDMScheduler

    pipe = zero(sd)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True, timestep_spacing="leading")
    assert pipe.scheduler.config["rescale_betas_zero_snr"]
    with fast(pipe, sd, cache) as made:
        assert not made.runtime.manifest.noise.zero_terminal_snr
        equal(pipe, made)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [False, True])
def test_trained_betas(sd: Path, cache: Path, zero: bool) -> None:
    betas = (1e-4 + 0.02 * np.linspace(0, 1, 1000) ** 3).tolist()
    settings = {**ZERO, "trained_betas": betas, "rescale_betas_zero_snr": zero}
    pipe = pipeline(sd, "ddim")
    pipe.scheduler = scheduler("ddim", **settings)
    with fast(pipe, sd, cache) as made:
        assert made.runtime.manifest.noise.kind == "betas"
        for solver in ("ddim", "dpmpp-2m"):
            pipe.scheduler = scheduler(solver, **settings)
            equal(pipe, made)


def test_a_prediction_of_the_noise_is_refused_where_there_is_no_signal(sd: Path, cache: Path) -> None:
    pipe = zero(sd)
    pipe.scheduler = scheduler("ddim", **{**ZERO, "prediction_type": "epsilon"})
    with fast(pipe, sd, cache) as made:
        with pytest.raises(BadSchedule, match=r"member 'large' predicts the noise.* at step 0 \(timestep 999\)"):
            made(**SD, fraction=0.0)
        pipe.scheduler = scheduler("ddim", **{**ZERO, "prediction_type": "epsilon", "timestep_spacing": "leading"})
        equal(pipe, made)


def test_a_pair_of_which_one_was_trained_without_signal(
    sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Built from folders: the large pipeline says so in its scheduler, the small UNet is the recipe's."""
    import torch

    pipe = zero(sd)
    large = shutil.copytree(sd / "large", tmp_path / "large", symlinks=True)
    pipe.scheduler.save_pretrained(large / "scheduler")
    side = Range(PIXELS, PIXELS, PIXELS)
    made = build(
        "sd15-bksdm-tiny",
        members={"small": sd / "small", "large": large},
        output=tmp_path / "zero.bundle",
        profile=Range(1, 2, 4),
        height=side,
        width=side,
    )
    assert made.noise.zero_terminal_snr
    assert made.members["small"].noise is not None
    assert not made.members["small"].noise.zero_terminal_snr
    assert any("begins with pure noise (zero terminal SNR)" in note for note in made.notes)
    x = noise(2)
    asked = {**SD, "num_inference_steps": 10}
    want = pipe(**asked, latents=torch.from_numpy(x), output_type="latent").images.numpy()
    given: dict[str, Any] = {"prompt": SD["prompt"], "negative_prompt": SD["negative_prompt"], "latents": x}
    with tstitch_trt.load(tmp_path / "zero.bundle", threads=1) as runtime, caplog.at_level(logging.WARNING):
        got = runtime.sample(**given, steps=10, guidance=5.0, fraction=0.0, decode=False)
        assert relative_error(got.latents, want) < LIMIT
        assert "member 'small'" not in caplog.text
        mixed = runtime.sample(**given, steps=10, guidance=5.0, decode=False)
    assert mixed.plan.schedule.names[0] == "small"
    assert "member 'small': steps 0 to 1 begin with pure noise; it was trained with up to 14.61" in caplog.text
    assert np.isfinite(mixed.latents).all()
    assert 0.1 < np.std(mixed.latents) / np.std(want) < 10
