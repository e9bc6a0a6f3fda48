"""A ControlNet beside both members, and a LoRA fused into one, against diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.compare import relative_error
from support.diffusers_pipelines import LATENTS, NEGATIVE, PROMPTS, bundle, sd_pipeline
from support.tiny_families import controlnet_folder, lora_file, unet_folder

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LIMIT = 1e-3  # relative, on latents
CALL = {"num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "latent", "height": 64, "width": 96}
ASK = {"steps": 6, "guidance": 5.0, "prompt": PROMPTS, "negative_prompt": NEGATIVE}
DDIM = {"solver": "ddim", "spacing": "leading", "solver_options": {"steps_offset": 1, "final": "sigma-min"}}


@dataclass
class Controlled:
    pipe: Any
    small: Any
    controlnet: Any
    runtime: tstitch_trt.Runtime


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    folder = tmp_path_factory.mktemp("controlled")
    pipe = sd_pipeline(folder / "large")
    small = unet_folder(folder / "small", "least", part=None, seed=5)
    controlnet = controlnet_folder(folder / "controlnet", "one")
    made = bundle(
        "sd15-bksdm-tiny",
        folder,
        members={"small": folder / "small", "large": folder / "large"},
        parts={"controlnet": folder / "controlnet"},
    )
    with tstitch_trt.load(made) as runtime:
        yield Controlled(pipe, small, controlnet, runtime)


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip


def call(pipe: Any, **more: Any) -> Any:
    negative = [NEGATIVE] * len(PROMPTS)
    return pipe(prompt=PROMPTS, negative_prompt=negative, latents=LATENTS(), **CALL, **more).images.detach().numpy()


@pytest.mark.parametrize(("member", "scale"), [("large", 0.7), ("small", 1.0)])
def test_control_of_one_member_is_that_of_diffusers(controlled: Controlled, member: str, scale: float) -> None:
    import torch
    from diffusers import StableDiffusionControlNetPipeline

    unet = controlled.small if member == "small" else controlled.pipe.unet
    more = {"unet": unet, "scheduler": scheduler(), "controlnet": controlled.controlnet}
    pipe = StableDiffusionControlNetPipeline(**{**controlled.pipe.components, **more}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    control = torch.from_numpy(picture / 255.0).permute(2, 0, 1)[None].float().repeat(2, 1, 1, 1)
    want = call(pipe, image=control, controlnet_conditioning_scale=scale)
    ask = {"latents": LATENTS().numpy(), "schedule": member, **ASK, **DDIM}
    got = controlled.runtime.sample(control=picture, control_scale=scale, **ask)
    assert relative_error(got.latents, want) < LIMIT
    free = controlled.runtime.sample(height=64, width=96, **ask)  # the residuals of the call before are gone
    pipe = controlled.pipe.__class__(**{**controlled.pipe.components, "unet": unet, "scheduler": scheduler()},
                                     requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    assert relative_error(free.latents, call(pipe)) < LIMIT
    assert relative_error(got.latents, free.latents) > 10 * LIMIT


def test_a_lora_is_that_of_diffusers(tmp_path: Path) -> None:
    pipe = sd_pipeline(tmp_path / "large", kind="least")
    unet_folder(tmp_path / "small", "least", part=None, seed=5)
    lora = lora_file(tmp_path / "style.safetensors", pipe.unet, style="peft")
    made = bundle(
        "sd15-bksdm-tiny",
        tmp_path / "made",
        members={"small": tmp_path / "small", "large": tmp_path / "large"},
        options={"large.lora": f"{lora}:0.7"},
    )
    pipe.scheduler = scheduler()
    plain = call(pipe)
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora(lora_scale=0.7)
    want = call(pipe)
    with tstitch_trt.load(made) as runtime:
        got = runtime.sample(latents=LATENTS().numpy(), fraction=0.0, **ASK, **DDIM)
    assert relative_error(got.latents, want) < LIMIT
    assert relative_error(got.latents, plain) > 10 * LIMIT
