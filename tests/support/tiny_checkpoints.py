"""Pipelines in pieces, for tests of what is read of them: folders that are whole enough to be inspected and built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.tiny_families import clip_text_folder, original_unet, unet_folder, vae_folder
from tstitch_export.planning.bundle import BundlePlan, plan_bundle

__all__ = ["MEMBER", "PNDM", "SD", "original_vae", "pieces", "planned", "said", "single_file", "text_recipe"]

PNDM = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
# A whole Stable Diffusion pipeline, for pieces()
SD: dict[str, Any] = {"text": 32, "vae": {"scaling_factor": 0.18215}, "scheduler": PNDM}
MEMBER = 'family = "{family}"\nparametrisation = "eps"\n'


def pieces(
    folder: Path,
    kind: str = "sd",
    *,
    text: int | None = None,
    vae: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    **unet: Any,
) -> Path:
    """A pipeline folder with a UNet of ``kind`` and, where asked for, text encoder (of this width), VAE, scheduler."""
    unet_folder(folder, kind, **unet)
    index = "StableDiffusionXLPipeline" if kind in ("sdxl", "ssd1b") else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": index}))
    if text is not None:
        clip_text_folder(folder, width=text)
    if vae is not None:
        vae_folder(folder / "vae", **{"levels": 4, **vae})
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def text_recipe(
    path: Path,
    *,
    members: tuple[str, ...] = ("small", "large"),
    decoder: str = 'kind = "vae"\nfactor = 8',
    conditioning: str = 'kind = "text"',
    more: str = "",
    family: str = "unet-sd",
    xl: bool = False,
    halves: tuple[str, ...] = ("decoder", "encoder"),
) -> Path:
    """A recipe for text members with 4 x 8 x 8 latents scaled by 0.18215, and all parts."""
    encoder = 'family = "clip-text"\noptions = { hidden_state = -2 }\n' if xl else 'family = "clip-text"\n'
    encoders = ("text_encoder", "text_encoder_2") if xl else ("text_encoder",)
    text = (
        'name = "pair"\ndescription = "for tests"\n'
        "[latent]\nchannels = 4\nheight = 8\nwidth = 8\nscaling = 0.18215\n"
        '[noise]\nkind = "scaled-linear"\nbeta_start = 0.00085\nbeta_end = 0.012\n'
        f"[conditioning]\n{conditioning}\n"
        f'[defaults]\nsolver = "ddim"\nsteps = 4\nspacing = "leading"\nschedule = "{members[0]}"\n'
        f"[decoder]\n{decoder}\n"
    )
    text += "".join(f"[members.{name}]\n{MEMBER.format(family=family)}" for name in members)
    text += "".join(f'[parts.{name}]\n{encoder}subfolder = "{name}"\n' for name in encoders)
    text += "".join(f'[parts.vae_{half}]\nfamily = "vae-{half}"\nsubfolder = "vae"\n' for half in halves)
    text += f'[parts.controlnet]\nfamily = "controlnet"\n{more}'
    path.write_text(text)
    return path


def planned(recipe: str | Path, **arguments: Any) -> BundlePlan:
    """What ``build`` decides before it exports anything."""
    empty: dict[str, Any] = {"members": {}, "parts": {}, "precision": "fp32", "options": {}}
    return plan_bundle(recipe, **{**empty, **arguments})


def said(plan: BundlePlan, *words: str) -> None:
    """There is a note with all of these words."""
    notes = plan.conventions.notes
    assert any(all(word in note for word in words) for note in notes), notes


def original_vae(model: Any, prefix: str) -> dict[str, Any]:
    """The autoencoder's tensors in the names of latent diffusion's own code."""
    levels = len(model.config.block_out_channels)
    out: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if "attentions" in parts:
            last = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
            tensor = tensor if last == "norm" or parts[-1] == "bias" else tensor[:, :, None, None]
            name = f"{parts[0]}.mid.attn_1.{last}.{parts[-1]}"
        elif "mid_block" in parts:
            name = f"{parts[0]}.mid.block_{int(parts[3]) + 1}." + ".".join(parts[4:])
        elif parts[1] in ("down_blocks", "up_blocks"):
            down = parts[1] == "down_blocks"
            level = int(parts[2]) if down else levels - 1 - int(parts[2])
            head = f"{parts[0]}.{'down' if down else 'up'}.{level}"
            if parts[3] == "resnets":
                name = f"{head}.block.{parts[4]}." + ".".join(parts[5:]).replace("conv_shortcut", "nin_shortcut")
            else:
                name = f"{head}.{'down' if down else 'up'}sample." + ".".join(parts[5:])
        elif parts[1] == "conv_norm_out":
            name = f"{parts[0]}.norm_out.{parts[-1]}"
        out[prefix + name] = tensor.clone().contiguous()
    return out


def single_file(path: Path, *, text: bool = True, vae: bool = True) -> Path:
    """A whole Stable Diffusion 1.x in one file, with the modules it was made from beside it in ``path.parent/parts``.

    The widths by which such files are recognised are the published ones, the rest is tiny.
    """
    from safetensors.torch import save_file

    parts = path.parent / "parts"
    unet = unet_folder(
        parts, "sd", cross_attention_dim=768, attention_head_dim=8, layers_per_block=2, norm_num_groups=32
    )
    state = original_unet(unet)
    if text:
        encoder = clip_text_folder(parts, width=768, layers=1)
        prefix = "cond_stage_model.transformer.text_model."
        state |= {prefix + key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    if vae:
        state |= original_vae(vae_folder(parts / "vae", levels=4), "first_stage_model.")
    save_file(state, path)
    return path
