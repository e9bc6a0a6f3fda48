"""The tensors of a LoRA file by layer, under whichever of the shared spellings it was written. No torch.

kohya's trainers write ``lora_unet_down_blocks_0_...to_q.lora_down.weight`` with an ``alpha`` per layer, for SDXL also
with the original block names (``lora_unet_input_blocks_4_1_...``); diffusers and PEFT write
``unet.down_blocks.0....to_q.lora_A.weight``, and once wrote ``...attn1.processor.to_q_lora.down.weight``. ComfyUI
writes ``diffusion_model.input_blocks.4.1....lora_down.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes

__all__ = ["LoraLayer", "lora_layers", "lora_looks_like"]

_PARTS: Final = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_KOHYA: Final = re.compile(r"(?:lora_(unet|te|te1|te2)|lycoris)_(\w+)\.(?:lora_(down|up|mid)\.weight|(alpha))")
_DOTTED: Final = re.compile(
    r"(?:base_model\.model\.)?(?:(unet|text_encoder|text_encoder_2|(?:model\.)?diffusion_model)\.)?(.+)"
)
# The end of a dotted key -> what it holds. The old spelling names the projection in the same word.
_ENDS: Final = (
    (re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight"), None),
    # with the adapter's name, where PEFT's own state is saved
    (re.compile(r"(.+)\.lora_A(?:\.[\w-]+)?\.weight"), "down"),
    (re.compile(r"(.+)\.lora_B(?:\.[\w-]+)?\.weight"), "up"),
    (re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.down\.weight"), "down"),
    (re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.up\.weight"), "up"),
    (re.compile(r"(.+)\.lora_down\.weight"), "down"),
    (re.compile(r"(.+)\.lora_up\.weight"), "up"),
    (re.compile(r"(.+)\.lora_mid\.weight"), "mid"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
)
_OTHER_METHODS: Final = {
    "hada_": "LoHa (LyCORIS)",
    "lokr_": "LoKr (LyCORIS)",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "boft_": "BOFT",
    "oft_": "OFT",
    ".diff": "a difference of whole weights",
    ".set_weight": "a replacement of whole weights",
    "w_norm": "a difference of norms (LyCORIS)",
    "b_norm": "a difference of norms (LyCORIS)",
    "on_input": "IA3 (LyCORIS)",
    "ia3_": "IA3",
    "vera_": "VeRA",
    "hra_": "HRA",
    ".a1.": "GLoRA (LyCORIS)",
    ".b1.": "GLoRA (LyCORIS)",
    "modules_to_save": "a LoRA with whole modules beside it",
    "lora_embedding": "a LoRA of embeddings",
    "lora_B.bias": "a LoRA with biases",
    "lora_up.bias": "a LoRA with biases",
    "lora_down.bias": "a LoRA with biases",
    "bundle_emb": "a LoRA with textual inversions",
    "emb_params": "a LoRA with textual inversions",
    "shift_bias": "a LoRA with shifts",
    "base_layer": "a whole model with a LoRA beside its weights",
}


@dataclass
class LoraLayer:
    """One layer: its part of the pipeline, the module's name in the file, and the keys of its tensors."""

    part: str
    name: str
    keys: dict[str, str] = field(default_factory=dict)  # down, up, mid, alpha -> key


def lora_layers(path: Path, shapes: Shapes) -> list[LoraLayer]:
    """The layers of all parts. Raises ``BadCheckpoint`` for a file that is no LoRA or has tensors of another method."""
    found: dict[tuple[str, str], LoraLayer] = {}
    strange: list[str] = []
    for key in shapes:
        read = _read(key)
        if read is None:
            strange.append(key)
            continue
        part, name, piece = read
        keys = found.setdefault((part, name), LoraLayer(part, name)).keys
        if piece in keys:
            raise BadCheckpoint(
                f"{path.name} holds several LoRAs: {keys[piece]} and {key} are of one layer",
                hint="save each adapter in a file of its own",
            )
        keys[piece] = key
    layers = [layer for layer in found.values() if {"down", "up"} <= set(layer.keys)]
    strange += [key for layer in found.values() if layer not in layers for key in layer.keys.values()]
    if not layers or strange:
        method = next((name for word, name in _OTHER_METHODS.items() for key in strange if word in key), None)
        what = f"is {method}, not a plain LoRA" if method else "is no LoRA" if not layers else "is no plain LoRA"
        raise BadCheckpoint(
            f"{path.name} {what}: {len(strange)} of its {len(shapes)} tensors are none of lora_down, lora_up, "
            f"lora_mid, alpha, lora_A, lora_B, e.g. {strange[0] if strange else 'none at all'}",
            hint="merge it into the model with the tool that made it, and give the merged model",
        )
    return layers


def _read(key: str) -> tuple[str, str, str] | None:
    if match := _KOHYA.fullmatch(key):
        return _PARTS[match[1] or "unet"], match[2], match[3] or match[4]
    dotted = _DOTTED.fullmatch(key)
    assert dotted is not None
    part, rest = dotted[1] or "unet", dotted[2]
    part = "unet" if part.endswith("diffusion_model") else part
    for pattern, piece in _ENDS:
        if (match := pattern.fullmatch(rest)) is None:
            continue
        if piece is not None:
            return part, match[1], piece
        letter = match[2]
        names = {"out": "to_out.0"} if part == "unet" else {name: f"{name}_proj" for name in ("q", "k", "v", "out")}
        return part, f"{match[1]}.{names.get(letter, f'to_{letter}')}", match[3]
    return None


def lora_looks_like(layers: Iterable[LoraLayer], shapes: Shapes) -> str:
    """What a LoRA was trained for, in words."""
    layers = list(layers)
    names = [layer.name.replace(".", "_") for layer in layers]

    def has(*words: str) -> bool:
        return any(word in name for word in words for name in names)

    if has("double_blocks", "single_blocks", "single_transformer_blocks"):
        return "a LoRA for Flux"
    if has("joint_blocks", "add_k_proj"):
        return "a LoRA for SD3"
    if has("motion_modules", "temp_attentions"):
        return "a LoRA for a video model"
    width = next(
        (
            shapes[layer.keys["down"]][1]
            for layer, name in zip(layers, names, strict=True)
            if len(shapes[layer.keys["down"]]) > 1
            and layer.part == "unet"
            and name.endswith(("attn2_to_k", "attn2_to_v"))
        ),
        None,
    )
    known = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "the SDXL refiner"}
    if width is not None:
        return f"a LoRA for {known[width]}" if width in known else f"a LoRA for a UNet with text of width {width}"
    if not any(layer.part == "unet" for layer in layers):
        return "a LoRA for text encoders only"
    if has("down_blocks", "input_blocks", "up_blocks", "output_blocks"):
        return "a LoRA for a UNet"
    return f"a LoRA for something unknown (layers like {layers[0].name})"
