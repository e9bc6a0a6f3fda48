"""What a checkpoint looks like: names and shapes of tensors that tell one family from another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tstitch_engines.errors import BadCheckpoint

__all__ = ["DIT_SIGNATURE", "Shapes", "check_config", "compare", "layer", "looks_like"]

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape

DIT_SIGNATURE: Final = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight")
_UNET: Final = "diffusion_model."


def layer(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer called ``name`` with a ``weight`` of this shape and a bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def check_config(config: Shapes, got: Shapes, weights: Path) -> None:
    """Raises ``BadCheckpoint`` unless the file ``weights`` has these tensors, as its ``config.json`` wants them."""
    for name, shape in config.items():
        if got.get(name) != shape:
            found = f"{name} of shape {list(got[name])}" if name in got else looks_like(got)
            raise BadCheckpoint(
                f"{weights} does not fit its config.json: found {found}; wanted is {name} {list(shape)}",
                hint="copy config.json and the weights from the same model",
            )


def compare(expected: Shapes, got: Shapes, name: str, kind: str, hint: str) -> None:
    """Raises ``BadCheckpoint`` unless the file called ``name`` has exactly the tensors of a ``kind``."""
    missing = [key for key in expected if key not in got]
    extra = [key for key in got if key not in expected]
    wrong = [key for key in expected if key in got and expected[key] != got[key]]
    if missing:
        problem = f"lacks {len(missing)} tensors, e.g. {missing[0]}"
    elif wrong:
        key = wrong[0]
        problem = f"has {key} of shape {list(got[key])}; allowed is {list(expected[key])}"
    elif extra:
        problem = f"has {len(extra)} tensors that no {kind} has, e.g. {extra[0]}"
        if any("lora" in key.lower() for key in extra):
            problem += " (an unmerged LoRA?)"
    else:
        return
    raise BadCheckpoint(f"{name} is not a whole {kind}: it {problem}", hint=hint)


# Kind -> strings of words. A checkpoint fits where, for each string, a tensor's name contains one of its words; ``|``
# stands for an end of a name. The first kind that fits counts.
_KINDS: Final[dict[str, tuple[str, ...]]] = {
    "a LoRA (give the model it was merged into)": ("lora_ .lora. lora_A lora_up",),
    "a class-conditional latent diffusion model (family ldm)": ("cond_stage_model.embedding.weight", _UNET),
    "a DiT": tuple(f"|{name}|" for name in DIT_SIGNATURE),
    "a U-ViT (family uvit)": ("mid_block.attn.qkv.weight", "in_blocks."),
    "a ControlNet": ("control_model. controlnet_cond_embedding. controlnet_down_blocks.",),
    "a whole Stable Diffusion checkpoint, a UNet with its VAE and text encoder": ("first_stage_model.", _UNET),
    "a UNet": ("down_blocks. input_blocks.", "time_embed"),
    "a VAE": ("quant_conv. decoder.conv_in. decoder.up_blocks. encoder.down_blocks.",),
    "a CLIP text encoder": ("text_model.encoder. token_embedding",),
    "the weights of a diffusers DiTTransformer2DModel (give the folder that holds them and config.json)": (
        "proj_out_1.weight",
        "transformer_blocks.",
    ),
    "a multimodal diffusion transformer (SD3 or Flux)": (
        "joint_blocks. double_blocks. single_transformer_blocks. context_embedder.",
    ),
    "a PixArt transformer": ("scale_shift_table caption_projection adaln_single",),
    "a vision transformer for classification": ("patch_embed.proj", "blocks.0.attn.qkv"),
}


def looks_like(shapes: Shapes) -> str:
    """Another kind of checkpoint in words, for the error that refuses it."""
    names = f"|{'|'.join(shapes)}|"
    for kind, groups in _KINDS.items():
        if all(any(word in names for word in group.split()) for group in groups):
            return kind
    if "x_embedder." in names or "final_layer.adaLN_modulation" in names:
        gone = ", ".join(key for key in DIT_SIGNATURE if key not in shapes) or "nothing"
        return f"a relative of DiT or a part of one (missing: {gone})"
    if 1 <= len(shapes) <= 2 and all(len(shape) <= 2 and "." not in name for name, shape in shapes.items()):
        return "a textual inversion (the option textual_inversion of a text encoder adds it)"
    return f"something unknown ({len(shapes)} tensors, e.g. {', '.join(list(shapes)[:3]) or 'none'})"
