"""Tiny diffusers pipelines with random weights, saved as folders, and bundles built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.tiny_families import clip_text_folder, unet_folder, vae_folder
from tstitch_engines.bundle.scheduler_config import read_scheduler
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_export.planning.recipe import load_recipe

__all__ = ["LATENTS", "NEGATIVE", "PROMPTS", "bundle", "sd_pipeline", "sdxl_pipeline", "settings_of"]

PROMPTS = ["a photo of an astronaut", "the cat's whiskers"]
NEGATIVE = "blurry"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _noise(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def LATENTS() -> Any:  # noqa: N802 - a constant that needs torch
    """Unit noise for two pictures of 64 x 96 pixels, which is not the size the models are native to."""
    return _noise(2, 4, 8, 12)


def sd_pipeline(folder: Path, **unet: Any) -> Any:
    """A ``StableDiffusionPipeline`` (PNDM, as Stable Diffusion 1.5) saved in ``folder``."""
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        text_encoder=clip_text_folder(folder),
        unet=unet_folder(folder, **{"kind": "one", **unet}),
        vae=vae_folder(folder / "vae", levels=4, latent_channels=4),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipe, folder)


def sdxl_pipeline(folder: Path, kind: str = "sdxl", scaling: float = 0.13025) -> Any:
    """SDXL's pipeline with its Euler scheduler, saved in ``folder``. ``kind``: that of its UNet (sdxl, ssd1b, refiner,
    xl-one, xl-least); ``scaling``: of its VAE."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(0)  # equal parts of two pipelines are exported once
    refiner = kind == "refiner"
    first = None if refiner else clip_text_folder(folder)
    second = clip_text_folder(folder, "text_encoder_2", projection=32 if refiner else 16, act="gelu", pad="!")
    pipe = (StableDiffusionXLImg2ImgPipeline if refiner else StableDiffusionXLPipeline)(
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=None if refiner else CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=unet_folder(folder, kind, seed=len(kind)),
        vae=vae_folder(folder / "vae", levels=4, latent_channels=4, scaling_factor=scaling),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        add_watermarker=False,
        force_zeros_for_empty_prompt=not refiner,
        **({"requires_aesthetics_score": True} if refiner else {}),
    )
    return _saved(pipe, folder)


def _saved(pipe: Any, folder: Path) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def bundle(recipe: str, folder: Path, **arguments: Any) -> Path:
    """A bundle by a shipped recipe, whose native size is made a tiny one: 64 pixels, profiles of 64 to 128."""
    spec, base = load_recipe(recipe)
    side = f"height = {spec.latent.height}\nwidth = {spec.latent.width}"
    text = (base / f"{recipe}.toml").read_text()
    assert side in text
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(text.replace(side, "height = 8\nwidth = 8"))
    output = folder / "bundle"
    sizes = {"height": Range(64, 64, 128), "width": Range(64, 64, 128)}
    build(folder / "recipe.toml", output=output, **{"profile": Range(1, 2, 4), **sizes, **arguments})
    return output


def settings_of(scheduler: Any) -> Mapping[str, Any]:
    """What ``runtime.sample`` is told so that it steps as this diffusers scheduler."""
    found = read_scheduler(json.loads(scheduler.to_json_string()))
    own = "sigmas" in found.options or found.solver == "lcm"  # they say themselves where the steps lie
    spacing = {} if own else {"spacing": found.spacing}
    return {"solver": found.solver, "solver_options": dict(found.options), **spacing}
