"""Tiny checkpoints of every family with random weights, written as their libraries write them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "SDXL",
    "STABLE_DIFFUSION_2",
    "clip_text_folder",
    "clip_tokenizer_folder",
    "clip_vocabulary",
    "controlnet_folder",
    "kl_folder",
    "lora_file",
    "original_control",
    "original_unet",
    "unet_folder",
    "vae_folder",
]

_WORDS = """a photo of an astronaut riding a horse on mars, oil painting; detailed. the cat's whiskers aren't blue
they've seen 1984 and 2001! we'll go, i'm there, she'd stay. красивый кот 猫が好き naïve café coöperate über straße
don't can't won't it's that's lighting cinematic portrait studio trending illustration masterpiece ugly blurry"""


def randomise(model: Any, seed: int, scale: float = 0.05) -> Any:
    """Adds noise to every parameter: zeros and ones at the start would hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


# --- text encoders


@cache
def clip_vocabulary() -> tuple[Mapping[str, int], tuple[tuple[str, str], ...]]:
    """Vocabulary and merges in CLIP's order: bytes, bytes that end a word, merges by rank, begin and end.

    The bytes' order is CLIP's own as well, so that "!" is 0 as in the published vocabulary.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False)
    words = _WORDS.split()
    shuffled = random.Random(0)
    tokenizer.train_from_iterator([" ".join(shuffled.choices(words, k=12)) for _ in range(200)], trainer)
    merges = tuple((left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"])
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    return {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def clip_tokenizer_folder(folder: Path, *, pad: str = "<|endoftext|>") -> Path:
    """A tokenizer folder as Stable Diffusion pipelines have it."""
    vocabulary, merges = clip_vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    end = {"__type": "AddedToken", "content": "<|endoftext|>", "normalized": True, "lstrip": False, "rstrip": False}
    settings = {"bos_token": {**end, "content": "<|startoftext|>"}, "eos_token": end, "unk_token": end}
    more = {"pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
    return folder


def clip_text_folder(
    pipeline: Path,
    part: str = "text_encoder",
    *,
    projection: int = 0,
    act: str = "quick_gelu",
    layers: int = 3,
    width: int = 32,
    legacy: bool = False,
    pad: str = "<|endoftext|>",
) -> Any:
    """Writes ``part`` and its tokenizer into ``pipeline``; returns the transformers module (float32).

    ``legacy``: eos_token_id 2, as in checkpoints from before transformers 4.31.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    vocabulary, _ = clip_vocabulary()
    bos, eos = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=projection or 16,
        hidden_act=act,
        bos_token_id=0 if legacy else bos,
        eos_token_id=2 if legacy else eos,
    )
    model = randomise((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed=len(part))
    logging.disable_progress_bar()
    model.save_pretrained(pipeline / part)
    clip_tokenizer_folder(pipeline / part.replace("text_encoder", "tokenizer"), pad=pad)
    return model


# --- UNets and ControlNets

_UNETS: dict[str, dict[str, Any]] = {
    # The names of the blocks' kinds and of text widths are those of the published models, the sizes are not.
    "sd": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 1),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}
_UNETS["refiner"] = {**_UNETS["sdxl"], "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 32 + 5 * 8}
_UNETS["ssd1b"] = {
    **_UNETS["sdxl"],
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, (2,)),
    "reverse_transformer_layers_per_block": ((1, 2), 1),
}
_UNETS["bksdm"] = {**_UNETS["sd"], "mid_block_type": None}
# Stable Diffusion's of one level, attention on the way down alone, and pruned: exported in a quarter of the time, for
# tests of what is around a UNet.
_UNETS["one"] = {
    **_UNETS["sd"],
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
_UNETS["least"] = {**_UNETS["one"], "mid_block_type": None}
_UNETS["xl-one"] = {
    **_UNETS["sdxl"],
    **{key: _UNETS["one"][key] for key in ("block_out_channels", "down_block_types", "up_block_types")},
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
}
_UNETS["xl-least"] = {**_UNETS["xl-one"], "mid_block_type": "UNetMidBlock2D"}


# Changes of ``sdxl`` and ``ssd1b``: the widths by which a single file is told
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 16 + 6 * 256,
}
# Changes of ``sd``: as many blocks as Stable Diffusion 2.x has, so that it has the tensor that tells its two branches
STABLE_DIFFUSION_2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "block_out_channels": (64, 64, 64, 64),
    "layers_per_block": 2,
    "attention_head_dim": 1,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}


def unet_folder(pipeline: Path, kind: str = "sd", *, part: str | None = "unet", seed: int = 3, **changes: Any) -> Any:
    """Writes a tiny UNet of this kind into ``pipeline/part`` and returns the module.

    ``kind``: sd, sdxl, refiner, ssd1b, bksdm, one, least, xl-one or xl-least. ``part=None`` writes a bare folder;
    ``changes`` are settings of diffusers' ``UNet2DConditionModel``. Text is 32 wide for Stable Diffusion and the
    refiner, 2 x 32 with a projection of 16 for SDXL.
    """
    import torch
    from diffusers import UNet2DConditionModel

    settings = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    torch.manual_seed(seed)
    model = randomise(UNet2DConditionModel(**{**settings, **_UNETS[kind], **changes}), seed)
    model.save_pretrained(pipeline / part if part else pipeline)
    return model


def controlnet_folder(folder: Path, kind: str = "sd", *, seed: int = 4, **changes: Any) -> Any:
    """Writes a tiny ControlNet for the UNets of this kind (sd, one, sdxl, ssd1b); returns the module."""
    import torch
    from diffusers import ControlNetModel

    ours = {**_UNETS[kind], "mid_block_type": "UNetMidBlock2DCrossAttn"}
    ours = {key: value for key, value in ours.items() if "up_block" not in key and "reverse" not in key}
    if kind == "ssd1b":
        ours["transformer_layers_per_block"] = (1, 2)
    settings = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (8, 16, 16, 32),
    }
    torch.manual_seed(seed)
    model = randomise(ControlNetModel(**{**settings, **ours, **changes}), seed)
    model.save_pretrained(folder)
    return model


# --- autoencoders


def vae_folder(folder: Path, kind: str = "kl", *, levels: int = 3, **changes: Any) -> Any:
    """Saves a diffusers autoencoder of ``kind`` (kl, tiny, vq) with ``2**(levels-1)`` pixels per latent element."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

    torch.manual_seed(0)  # equal ones are exported once
    if kind == "tiny":
        layers: dict[str, Any] = {"num_encoder_blocks": (1,) * levels, "num_decoder_blocks": (1,) * levels}
        layers |= {"encoder_block_out_channels": (16,) * levels, "decoder_block_out_channels": (16,) * levels}
        model = AutoencoderTiny(**layers, **changes)
    else:
        sides = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
        common = {**sides, "block_out_channels": (32,) * levels, "sample_size": 32}
        if kind == "vq":
            model = VQModel(**{**common, "num_vq_embeddings": 24, "scaling_factor": 0.5, **changes})
        else:
            model = AutoencoderKL(**{**common, **changes})
    randomise(model, seed=len(kind))
    if kind == "vq":
        model.quantize.embedding.weight.data.mul_(10.0)  # entries as far apart as latents are
    model.save_pretrained(folder)
    return model


def kl_folder(folder: Path) -> Any:
    """The autoencoder that tests of a VAE alone share, so that it is exported once: 2 pixels per latent element, and
    another scale and shift than the defaults."""
    return vae_folder(folder, levels=2, scaling_factor=0.13025, shift_factor=0.1)


def original_unet(module: Any) -> dict[str, Any]:
    """The UNet's tensors as single-file checkpoints hold them."""
    from tstitch_export.families.unet.config import UNetConfig
    from tstitch_export.families.unet.layout import PREFIX, module_names

    originals = module_names(UNetConfig(dict(module.config)))
    return {PREFIX + _original(key, originals): tensor for key, tensor in module.state_dict().items()}


def original_control(module: Any, prefix: str = "control_model.") -> dict[str, Any]:
    """The ControlNet's tensors as single-file checkpoints hold them."""
    from tstitch_export.families.unet.config import UNetConfig
    from tstitch_export.families.unet.layout import down_names

    config = dict(module.config)
    originals = down_names(UNetConfig(config))
    hints = len(config["conditioning_embedding_out_channels"])
    parts = ["conv_in", *(f"blocks.{n}" for n in range(2 * hints - 2)), "conv_out"]
    originals |= {f"controlnet_cond_embedding.{part}": f"input_hint_block.{2 * n}" for n, part in enumerate(parts)}
    originals |= {f"controlnet_down_blocks.{n}": f"zero_convs.{n}.0" for n in range(len(module.controlnet_down_blocks))}
    originals["controlnet_mid_block"] = "middle_block_out.0"
    return {prefix + _original(key, originals): tensor for key, tensor in module.state_dict().items()}


def lora_file(
    path: Path, module: Any, *, style: str = "kohya", rank: int = 4, alpha: float = 2.0, seed: int = 5, text: Any = None
) -> Path:
    """Writes a random LoRA for a UNet, and for the text encoder ``text``; ``alpha`` counts in all but ``processors``.

    ``style``: ``kohya`` (all kinds of layers, LoCon), ``original`` (the same under SDXL's original block names),
    ``peft`` (as diffusers saves them now) or ``processors`` (as it saved them first: attention only).
    """
    import torch
    from safetensors.torch import save_file

    from tstitch_export.families.unet.config import UNetConfig
    from tstitch_export.families.unet.layout import module_names

    generator = torch.Generator().manual_seed(seed)
    originals = module_names(UNetConfig(dict(module.config)))
    ends = ["to_q", "to_k", "to_v", "to_out.0"]
    if style != "processors":
        ends += ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    if style in ("kohya", "original"):
        ends += ["conv1", "conv_shortcut", "time_emb_proj", "conv", "conv_in", "conv_out", "linear_1"]
    tensors: dict[str, Any] = {}
    noted: dict[str, Any] = {}  # what diffusers writes into the header

    def add(part: str, name: str, weight: Any) -> None:
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2), generator=generator) * 0.2
        if style == "peft":
            tensors.update({f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up})
            noted.update({f"{part}.r": rank, f"{part}.lora_alpha": alpha})
            noted.setdefault(f"{part}.target_modules", []).append(name)
        elif style == "processors":
            head, _, projection = name.removesuffix(".0").rpartition(".")
            base = f"{part}.{head}.processor.{projection}_lora"
            tensors.update({f"{base}.down.weight": down, f"{base}.up.weight": up})
        else:
            if part == "unet" and style == "original":
                name = _original(name, originals)
            base = f"lora_{'unet' if part == 'unet' else 'te'}_{name.replace('.', '_')}"
            tensors.update({f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up})
            tensors[f"{base}.alpha"] = torch.tensor(alpha)

    for part, model in (("unet", module), ("text_encoder", text)):
        for key, weight in model.state_dict().items() if model is not None else ():
            name = key.removesuffix(".weight")
            wanted = ends if part == "unet" else ["q_proj", "v_proj", "fc1"]
            if key.endswith(".weight") and any(name == end or name.endswith(f".{end}") for end in wanted):
                add(part, name, weight)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(noted)} if noted else None)
    return path


def _original(name: str, originals: Mapping[str, str]) -> str:
    parts = name.split(".")
    cut = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in originals)
    return ".".join((originals[".".join(parts[:cut])], *parts[cut:]))
