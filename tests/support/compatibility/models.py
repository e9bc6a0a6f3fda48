"""Keys of ``config.json``: models of diffusers are made with each and read; text encoders are compared too."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from support.compatibility.markdown import attempt, code, codes, table
from support.tiny_families import (
    clip_text_folder,
    clip_tokenizer_folder,
    clip_vocabulary,
    controlnet_folder,
    unet_folder,
    vae_folder,
)
from tstitch_export.families import open_family
from tstitch_export.families.clip_text.tokenizer import read_tokenizer

__all__ = ["model_section"]

# What to try of a key; of others the opposite of a switch, or another number
_TRIED: Final[Mapping[str, tuple[Any, ...]]] = {
    "sample_size": (16,),
    "in_channels": (9,),
    "out_channels": (8,),
    "down_block_types": (
        ("CrossAttnDownBlock2D", "KDownBlock2D"), ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"), ("CrossAttnDownBlock2D", "SkipDownBlock2D"),
        ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
    ),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"),
    "act_fn": ("gelu", "mish"),
    "cross_attention_dim": ([32, 48],),
    "transformer_layers_per_block": (2,),
    "encoder_hid_dim_type": ("text_proj", "image_proj", "text_image_proj"),
    "class_embed_type": ("timestep", "identity", "projection", "simple_projection"),
    "addition_embed_type": ("text", "text_image", "image", "image_hint"),
    "num_class_embeds": (10,),
    "encoder_hid_dim": (16,),
    "resnet_time_scale_shift": ("scale_shift",),
    "time_embedding_type": ("fourier",),
    "time_embedding_dim": (64,),
    "time_embedding_act_fn": ("silu",),
    "timestep_post_act": ("silu",),
    "time_cond_proj_dim": (16,),
    "conv_in_kernel": (1,),
    "conv_out_kernel": (1,),
    "attention_type": ("gated",),
    "cross_attention_norm": ("layer_norm", "group_norm"),
    "mid_block_only_cross_attention": (True,),
    "controlnet_conditioning_channel_order": ("bgr",),
    "conditioning_channels": (1,),
    "latent_channels": (16,),
    "latents_mean": ([0.1, 0.1, 0.1, 0.1],),
    "latents_std": ([0.9, 0.9, 0.9, 0.9],),
    "shift_factor": (0.1,),
    "scaling_factor": (0.3,),
}  # fmt: skip
_BESIDE: Final[Mapping[tuple[str, Any], Mapping[str, Any]]] = {
    ("encoder_hid_dim_type", "text_proj"): {"encoder_hid_dim": 32},
    ("encoder_hid_dim_type", "image_proj"): {"encoder_hid_dim": 32},
    ("encoder_hid_dim_type", "text_image_proj"): {"encoder_hid_dim": 32},
    ("class_embed_type", "projection"): {"projection_class_embeddings_input_dim": 16},
    ("class_embed_type", "simple_projection"): {"projection_class_embeddings_input_dim": 16},
    ("addition_embed_type", "text"): {"addition_embed_type_num_heads": 2},
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"): {"resnet_time_scale_shift": "default"},
}
# They make sizes, which the weights must have, or are part of another key
_SIZES: Final = frozenset({
    "block_out_channels", "layers_per_block", "up_block_types", "norm_num_groups", "attention_head_dim",
    "num_attention_heads", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads", "conditioning_embedding_out_channels", "reverse_transformer_layers_per_block",
})  # fmt: skip
_TEXT: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": ("gelu", "relu", "quick_gelu", "silu"),
    "layer_norm_eps": (0.1,),
    "num_attention_heads": (4,),
    "attention_dropout": (0.5,),
    "initializer_range": (0.5,),
    "pad_token_id": (3,),
    "bos_token_id": (3,),
    "projection_dim": (8,),
    "output_hidden_states": (True,),
    "use_attention_mask": (True,),
    "quantization_config": ({"quant_method": "bitsandbytes"},),
    "text_config": ({"hidden_size": 64},),
}


_TOKENIZER: Final[Mapping[str, tuple[Any, ...]]] = {
    "pad_token": ("!",),
    "unk_token": ("!",),
    "model_max_length": (40,),
    "do_lower_case": (False,),
    "add_prefix_space": (True,),
    "errors": ("ignore",),
    "clean_up_tokenization_spaces": (True,),
    "additional_special_tokens": (["cat</w>"],),
    "truncation_side": ("left",),
    "padding_side": ("left",),
    "split_special_tokens": (True,),
}
_TEXTS: Final = ("a photo of a Cat ", "it's naïve, can't <|endoftext|> 1984 ½!!", "猫 🐱 קטה", "")


def model_section(folder: Path) -> str:
    """``folder``: an empty one, for the files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [
            _row(folder, "UNet2DConditionModel", "unet-sd", lambda to, **keys: unet_folder(to, part=None, **keys)),
            _row(folder, "ControlNetModel", "controlnet", controlnet_folder),
            _row(folder, "AutoencoderKL", "vae-decoder", lambda to, **keys: vae_folder(to, levels=2, **keys)),
            ("`CLIPTextModel`", *_text_encoder(folder)),
            ("`CLIPTokenizer` (tokenizer_config.json)", *_tokenizer(folder)),
        ]
    return "\n\n".join(
        [
            "## Keys of config.json",
            "UNets, ControlNets and autoencoders are exported from diffusers' own classes, so a key that is honoured "
            "means what it means in diffusers. Each key was tried. Text encoders and tokenizers were compared with "
            "those of transformers.",
            table(("class", "honoured", "refused: another kind of model"), rows),
            f"Not tried are the keys that set sizes, which the weights must have: {codes(sorted(_SIZES))}.",
        ]
    )


def _row(folder: Path, name: str, family: str, write: Callable[..., object]) -> tuple[str, str, str]:
    import diffusers

    honoured, refused = list[str](), dict[str, list[str]]()
    for key, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items():
        if key == "self" or key in _SIZES:
            continue
        for value in _TRIED[key] if key in _TRIED else (_other(parameter.default),):
            place = folder / name
            shutil.rmtree(place, ignore_errors=True)
            try:
                write(place, **{key: value}, **_BESIDE.get((key, value), {}) if not isinstance(value, list) else {})
            except Exception:  # noqa: S112  # diffusers itself has no such model
                continue
            found, why = attempt(lambda place=place: open_family(family).inspect(place, {}), without=[str(place)])
            if found is None:
                refused.setdefault(key, []).append(_shown(value, why))
            else:
                honoured.append(code(key))
    return code(name), ", ".join(dict.fromkeys(honoured)), _cell(refused)


def _other(default: Any) -> Any:
    if isinstance(default, bool):
        return not default
    assert isinstance(default, int | float), f"add what to try instead of {default!r} to _TRIED"
    return default + 1 if isinstance(default, int) else (default or 0.1) * 2


def _shown(value: Any, why: str | None) -> str:
    """The value, and what is allowed where the refusal says it."""
    allowed = re.search(r"(?:allowed is|known are) .*", why or "")
    kinds = {list: "a list", dict: "any"}
    shown = kinds.get(type(value)) or code(value[-1] if isinstance(value, tuple) else value)  # the block that is meant
    return shown + (f" ({allowed[0]})" if allowed else "")


def _cell(refused: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{code(key)}: {', '.join(values)}" for key, values in refused.items())


def _text_encoder(folder: Path) -> tuple[str, str]:
    """Each key is put into the file; ours must then compute what transformers computes, or refuse it."""
    import torch
    from transformers import CLIPTextModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    clip_text_folder(folder / "clip", layers=1)
    place = folder / "clip/text_encoder"
    plain = (place / "config.json").read_text()
    tokens = torch.randint(0, len(clip_vocabulary()[0]) - 2, (2, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 40:] = len(clip_vocabulary()[0]) - 1
    honoured, refused = list[str](), dict[str, list[str]]()
    for key, values in _TEXT.items():
        for value in values:
            (place / "config.json").write_text(json.dumps({**json.loads(plain), key: value}))
            family = open_family("clip-text")
            found, why = attempt(lambda family=family: family.inspect(place, {}), without=[str(place)])
            if found is None:
                refused.setdefault(key, []).append(_shown(value, why))
                continue
            if key != "use_attention_mask":  # which pipelines act upon, not the model
                with torch.no_grad():
                    want = CLIPTextModel.from_pretrained(place).eval()(tokens).last_hidden_state
                    got = family.load(found)(tokens)  # type: ignore[arg-type]
                hidden = got[0] if isinstance(got, tuple) else got
                assert torch.allclose(hidden, want, rtol=1e-4, atol=1e-4), f"{key} = {value!r} is ignored"
            honoured.append(code(key))
    return ", ".join(dict.fromkeys(honoured)), _cell(refused)


def _tokenizer(folder: Path) -> tuple[str, str]:
    """Each key is put into the file; ours must then make the tokens that transformers makes, or refuse it."""
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    place = clip_tokenizer_folder(folder / "tokenizer")
    plain = json.loads((place / "tokenizer_config.json").read_text())
    honoured, refused = list[str](), dict[str, list[str]]()
    for key, values in _TOKENIZER.items():
        for value in values:
            (place / "tokenizer_config.json").write_text(json.dumps({**plain, key: value}))
            found, why = attempt(lambda: read_tokenizer(place), without=[str(place)])
            if found is None:
                refused.setdefault(key, []).append(_shown(value, why))
                continue
            found.write(folder / "tokenizer.json")  # type: ignore[attr-defined]
            ours, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), CLIPTokenizer.from_pretrained(place)
            for text in _TEXTS:
                assert ours.encode(text).ids == theirs(text).input_ids, f"{key} = {value!r} is ignored"
            honoured.append(code(key))
    return ", ".join(honoured), _cell(refused)
