"""Latent consistency models and UNets that paint into a picture on our runtime, against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.accelerating import LIMIT, SD, pipeline
from support.compare import relative_error
from support.diffusers_pipelines import settings_of
from support.tiny_families import unet_folder
from support.tiny_pipelines import PIXELS, noise, scheduler
from tstitch_engines.device.host_kernels import normal
from tstitch_engines.errors import BadInput
from tstitch_engines.spec import Range
from tstitch_export.build import build

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SEEDS = (3, 9)
FRACTIONS = (0.0, 0.5, 1.0)


class Pair:
    """Two UNets as modules, and a runtime of both."""

    def __init__(self, sd: Path, folder: Path, *, seed: int, **unet: Any) -> None:
        """``seed``: of the large one, which has the shape of the small one. ``unet``: settings of both."""
        self.small = unet_folder(folder / "small", "least", part=None, seed=10, **unet)
        self.large = unet_folder(folder / "large", "least", part=None, seed=seed, **unet)
        sides = Range(PIXELS, PIXELS, PIXELS)
        build(
            "sd15-bksdm-tiny",
            members={"small": folder / "small", "large": folder / "large"},
            parts={"text_encoder": sd / "large/text_encoder"},
            output=folder / "pair.bundle",
            profile=Range(1, 2, 4),
            height=sides,
            width=sides,
        )
        self.runtime = tstitch_trt.load(folder / "pair.bundle", threads=1)

    def theirs(self, pipe: Any, early: int, steps: int, **asked: Any) -> Any:
        """The pipeline's latents with ``early`` steps of the small UNet and the rest of ``steps`` of the large one."""

        def swap(running: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            running.unet = self.small if step + 1 < early else self.large
            return {}

        pipe.unet = self.small if early else self.large
        more: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent", "callback_on_step_end": swap}
        return pipe(**asked, **more).images.numpy()


@pytest.fixture(scope="module")
def distilled(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(sd, tmp_path_factory.mktemp("distilled"), seed=9, time_cond_proj_dim=16)
    with pair.runtime:
        yield pair


@pytest.fixture(scope="module")
def painting(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(sd, tmp_path_factory.mktemp("painting"), seed=8, in_channels=9)
    with pair.runtime:
        yield pair


def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' LCM scheduler draws what our lanes draw, from the first step on."""
    import torch
    from diffusers.schedulers import scheduling_lcm

    steps = iter(range(100))

    def draw(shape: Any, **_: Any) -> Any:
        step = next(steps)
        return torch.from_numpy(np.stack([normal(seed, step, 256).reshape(4, 8, 8) for seed in SEEDS]))

    monkeypatch.setattr(scheduling_lcm, "randn_tensor", draw)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("cls", ["LatentConsistencyModelPipeline", "StableDiffusionPipeline"])
def test_latent_consistency_models(
    distilled: Pair, sd: Path, cls: str, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps; the guidance scale reaches both as ``timestep_cond``, and no second half runs."""
    import torch

    x = noise(2)
    pipe = pipeline(sd, "lcm", cls, unet=distilled.large)
    asked = {"prompt": SD["prompt"], "guidance_scale": 6.0, "latents": torch.from_numpy(x)}
    same_noise(monkeypatch)
    want = distilled.theirs(pipe, round(4 * fraction), 4, **asked)
    given: dict[str, Any] = {"prompt": SD["prompt"], "seeds": SEEDS, "latents": x, "steps": 4, "fraction": fraction}
    got = distilled.runtime.sample(**given, guidance=6.0, **settings_of(scheduler("lcm")))
    assert not any(got.plan.guided)
    assert relative_error(got.latents, want) < LIMIT
    other = distilled.runtime.sample(**given, guidance=2.0, **settings_of(scheduler("lcm")))
    assert relative_error(other.latents, want) > 10 * LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_members_that_paint_into_a_picture(painting: Pair, sd: Path, strength: float, fraction: float) -> None:
    """9 channels: mask and masked picture beside the latent in every step. Both start from one latent and one noise."""
    import torch

    pipe = pipeline(sd, "ddim", "StableDiffusionInpaintPipeline", unet=painting.large)
    clean, z, outside = 0.7 * noise(2, seed=3), noise(2, seed=4), 0.6 * noise(2, seed=5)
    mask = np.zeros((PIXELS, PIXELS), np.float32)
    mask[16:40, 8:56] = 1
    steps = 6
    running = int(steps * strength)
    early = max(0, round(fraction * steps) - (steps - running))
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(z))
        want = painting.theirs(
            pipe, early, steps, prompt=SD["prompt"], negative_prompt=SD["negative_prompt"], guidance_scale=5.0,
            image=torch.from_numpy(clean), mask_image=torch.from_numpy(mask)[None, None], strength=strength,
            masked_image_latents=torch.from_numpy(outside), height=PIXELS, width=PIXELS,
        )  # fmt: skip
    given: dict[str, Any] = {"image": clean, "mask": mask, "masked_image": outside, "latents": z, "strength": strength}
    asked = {"prompt": SD["prompt"], "negative_prompt": SD["negative_prompt"], "steps": steps, "guidance": 5.0}
    settings = settings_of(scheduler("ddim"))
    got = painting.runtime.sample(**asked, **given, fraction=fraction, **settings)
    assert relative_error(got.latents, want) < LIMIT
    given["masked_image"] = np.zeros_like(outside)
    other = painting.runtime.sample(**asked, **given, fraction=fraction, **settings)
    assert relative_error(other.latents, want) > 10 * LIMIT
    with pytest.raises(BadInput, match="paints into a picture, and there is no picture or no mask"):
        painting.runtime.sample(**asked)
