"""What a checkpoint looks like: names and shapes of tensors that tell one family from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tstitch_engines.errors import BadCheckpoint

__all__ = ["DIT_SIGNATURE", "Shapes", "compare", "looks_like"]

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape

DIT_SIGNATURE: Final = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight")


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


def looks_like(shapes: Shapes) -> str:
    """Another kind of checkpoint in words, for the error that refuses it."""
    names = list(shapes)

    def has(*parts: str) -> bool:
        return any(part in name for part in parts for name in names)

    if has("lora_", ".lora.", "lora_A", "lora_up"):
        return "a LoRA (give the model it was merged into)"
    if has("cond_stage_model.embedding.weight") and has("diffusion_model."):
        return "a class-conditional latent diffusion model (family ldm)"
    if all(key in names for key in DIT_SIGNATURE):
        return "a DiT"
    if has("mid_block.attn.qkv.weight") and has("in_blocks."):
        return "a U-ViT (family uvit)"
    if has("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks."):
        return "a ControlNet"
    if has("first_stage_model.") and has("diffusion_model."):
        return "a whole Stable Diffusion checkpoint, a UNet with its VAE and text encoder"
    if has("down_blocks.", "input_blocks.") and has("time_embed", "time_embedding"):
        return "a UNet"
    if has("quant_conv.", "decoder.conv_in.", "decoder.up_blocks.", "encoder.down_blocks."):
        return "a VAE"
    if has("text_model.encoder.", "token_embedding"):
        return "a CLIP text encoder"
    if has("proj_out_1.weight") and has("transformer_blocks."):
        return "the weights of a diffusers DiTTransformer2DModel (give the folder that holds them and config.json)"
    if has("joint_blocks.", "double_blocks.", "single_transformer_blocks.", "context_embedder."):
        return "a multimodal diffusion transformer (SD3 or Flux)"
    if has("scale_shift_table", "caption_projection", "adaln_single"):
        return "a PixArt transformer"
    if has("patch_embed.proj") and has("blocks.0.attn.qkv"):
        return "a vision transformer for classification"
    if has("x_embedder.", "final_layer.adaLN_modulation"):
        gone = ", ".join(key for key in DIT_SIGNATURE if key not in shapes) or "nothing"
        return f"a relative of DiT or a part of one (missing: {gone})"
    return f"something unknown ({len(names)} tensors, e.g. {', '.join(names[:3]) or 'none'})"
