"""Single-file Stable Diffusion and SDXL checkpoints: the UNet inside, under the names its authors gave it. No torch.

The layout is that of github.com/CompVis/latent-diffusion and github.com/Stability-AI/generative-models: numbered
``input_blocks``, ``middle_block`` and ``output_blocks``, each a list of a residual block, a transformer and a
convolution that changes the size. Attention heads leave no trace in the shapes: they are those of the published models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes, looks_like
from tstitch_export.checkpoint.statements import MARKERS, check_markers
from tstitch_export.families.unet.config import UNetConfig

__all__ = [
    "PREFIX",
    "config_from_diffusers_names",
    "config_from_shapes",
    "down_names",
    "has_diffusers_names",
    "module_names",
    "rename",
    "unet_shapes",
    "way_down",
]

PREFIX: Final = "model.diffusion_model."
_WHOLE: Final = "give a whole checkpoint of Stable Diffusion 1.x, 2.x or SDXL, or a diffusers folder"
_HEAD: Final = 64  # channels of an attention head where the projections are linear: Stable Diffusion 2.x and SDXL
_HEADS: Final = 8  # heads where they are convolutions: Stable Diffusion 1.x
_EMBEDDED: Final = 256  # width of one embedded number of SDXL's sizes

_GUIDED: Final = "time_embedding.cond_proj.weight"  # of a UNet that is told the guidance scale; the original has none
_BLOCK: Final = re.compile(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")

# diffusers' name of a part of a residual block -> the original one
_RESNET: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors of the UNet without their prefix, from a whole checkpoint or from a UNet's own file."""
    inside = {key.removeprefix(PREFIX): shape for key, shape in shapes.items() if key.startswith(PREFIX)}
    bare = {key: shape for key, shape in shapes.items() if key not in MARKERS}
    return inside or (bare if "input_blocks.0.0.weight" in shapes else {})


def config_from_shapes(shapes: Shapes, *, name: str) -> UNetConfig:
    """The diffusers configuration of the UNet in a checkpoint; ``name`` is the file's, for messages.

    Raises ``BadCheckpoint`` saying what the file looks like when it has no such UNet, or one of an unknown kind.
    """
    inside = unet_shapes(shapes)
    if "input_blocks.0.0.weight" not in inside or "out.2.weight" not in inside:
        raise BadCheckpoint(
            f"{name} is no Stable Diffusion checkpoint: it looks like {looks_like(shapes)}",
            hint=f"{_WHOLE}; a member of another kind needs another family in the recipe",
        )
    check_markers(shapes, name)
    return _Reader(inside, name).config()


def has_diffusers_names(shapes: Shapes) -> bool:
    """Whether these are the tensors of a diffusers UNet, or of a relative of one."""
    return "conv_in.weight" in shapes and "time_embedding.linear_1.weight" in shapes


def config_from_diffusers_names(shapes: Shapes, *, name: str) -> UNetConfig:
    """The configuration of a UNet under diffusers' names, which are read through the original ones.

    Raises what ``config_from_shapes`` does.
    """
    own = {key: shape for key, shape in shapes.items() if key != _GUIDED}
    if "conv_out.weight" not in own:
        raise BadCheckpoint(f"{name} is no UNet: it looks like {looks_like(shapes)}", hint=_WHOLE)
    counted: dict[tuple[str, int], int] = {}
    for key in own:
        if match := _BLOCK.fullmatch(key):
            place = (match[1], int(match[2]))
            counted[place] = max(counted.get(place, 0), 1 + int(match[3]))
    levels = range(1 + max((level for way, level in counted if way == "down"), default=-1))
    crossed = [any(key.startswith(f"up_blocks.{level}.attentions.") for key in own) for level in levels]
    names = module_names(
        UNetConfig(
            {
                "block_out_channels": [1] * len(levels),
                "layers_per_block": [counted.get(("down", level), 0) for level in levels],
                "up_block_types": ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in crossed],
                "addition_embed_type": "text_time" if "add_embedding.linear_1.weight" in own else None,
            }
        )
    )
    theirs = rename(own, {original: ours for ours, original in names.items()}, name=name)
    raw = _Reader({theirs[key]: shape for key, shape in own.items()}, name).config().raw
    return UNetConfig({**raw, "time_cond_proj_dim": shapes[_GUIDED][1]} if _GUIDED in shapes else raw)


def way_down(shapes: Shapes, *, name: str, kind: str, hint: str) -> dict[str, Any]:
    """What the way down of a ``kind`` of network tells of diffusers' configuration, from the tensors without prefix.

    Raises ``BadCheckpoint`` where its blocks are not those of a UNet.
    """
    return _Reader(shapes, name, kind, hint).way_down()


def down_names(config: UNetConfig) -> dict[str, str]:
    """diffusers' module names -> the original ones, of the embeddings, the way down and the middle."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    if config["addition_embed_type"] is not None:
        names |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}

    index, levels = 1, len(config.channels)
    for level, layers in enumerate(config.layers):
        for layer in range(layers):
            names |= _resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{index}.0")
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if level < levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    names |= _resnet("mid_block.resnets.0", "middle_block.0")
    names["mid_block.attentions.0"] = "middle_block.1"
    return names | _resnet("mid_block.resnets.1", "middle_block.2")


def module_names(config: UNetConfig) -> dict[str, str]:
    """diffusers' module names -> the original ones, for every module but those within transformers."""
    names = {**down_names(config), "conv_norm_out": "out.0", "conv_out": "out.2"}
    index, levels = 0, len(config.channels)
    for level, (layers, kind) in enumerate(zip(reversed(config.layers), config["up_block_types"], strict=True)):
        for layer in range(layers + 1):
            names |= _resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{index}.0")
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        if level < levels - 1:
            place = 2 if "CrossAttn" in kind else 1
            names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{place}.conv"
    return names


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{original}" for part, original in _RESNET.items()}


def rename(
    keys: Iterable[str], names: Mapping[str, str], *, name: str, kind: str = "UNet", hint: str = _WHOLE
) -> dict[str, str]:
    """Each key (without prefix) -> diffusers' name, by ``names`` of modules (diffusers' -> the original ones).

    Raises ``BadCheckpoint`` for one that has none.
    """
    theirs = {original: ours for ours, original in names.items()}
    found: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        # The longest first: output_blocks.2.1.conv is an upsampler, output_blocks.2.1 a transformer.
        for cut in range(len(parts) - 1, 0, -1):
            if (ours := theirs.get(".".join(parts[:cut]))) is not None:
                found[key] = ".".join((ours, *parts[cut:]))
                break
        else:
            raise BadCheckpoint(f"{name} has a tensor that no known {kind} has: {key}", hint=hint)
    return found


class _Reader:
    """Walks the numbered blocks of one checkpoint."""

    def __init__(self, shapes: Shapes, name: str, kind: str = "UNet", hint: str = _WHOLE) -> None:
        self._shapes = shapes
        self._name = name
        self._kind = kind
        self._hint = hint

    def config(self) -> UNetConfig:
        raw = self.way_down()
        up = self._up(raw["layers_per_block"])
        raw |= {
            "out_channels": self._shapes["out.2.weight"][0],
            "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up],
            "reverse_transformer_layers_per_block": [_one(level) for level in up],
        }
        config = UNetConfig(raw)
        rename(self._shapes, module_names(config), name=self._name)
        return config

    def way_down(self) -> dict[str, Any]:
        """What does not depend on the way up."""
        down, widths = self._down()
        middle = self._middle(down)
        context = self._context()
        shapes = self._shapes
        linear = any(key.endswith("proj_in.weight") and len(shape) == 2 for key, shape in shapes.items())
        if linear and any(width % _HEAD for width in widths):
            raise self._unknown(f"its levels have {widths} channels, which are no multiples of {_HEAD}")
        raw: dict[str, Any] = {
            "in_channels": shapes["input_blocks.0.0.weight"][1],
            "block_out_channels": widths,
            "layers_per_block": [len(level) for level in down],
            "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in down],
            "mid_block_type": ("UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D")
            if "middle_block.0.in_layers.0.weight" in shapes
            else None,
            "cross_attention_dim": context,
            "use_linear_projection": linear,
            "attention_head_dim": [width // _HEAD for width in widths] if linear else _HEADS,
            "transformer_layers_per_block": [_one(level) for level in down],
        }
        if middle and not any(down[-1]):
            raw["transformer_layers_per_block"][-1] = middle
        if (label := shapes.get("label_emb.0.0.weight")) is not None:
            if context not in (1280, 2048):
                raise self._unknown("it takes an embedded picture or class beside the text (unCLIP or an upscaler)")
            raw |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": _EMBEDDED,
                "projection_class_embeddings_input_dim": label[1],
            }
        return raw

    def _down(self) -> tuple[list[list[int]], list[int]]:
        """Transformer layers of every block by level, and the channels of each level."""
        levels: list[list[int]] = [[]]
        widths: list[int] = []
        index = 1
        while True:
            block = f"input_blocks.{index}"
            if f"{block}.0.op.weight" in self._shapes:
                levels.append([])
            elif (conv := self._shapes.get(f"{block}.0.out_layers.3.weight")) is not None:
                widths[len(levels) - 1 :] = [conv[0]]
                levels[-1].append(self._depth(f"{block}.1"))
            else:
                break
            index += 1
        if len(widths) != len(levels) or any(0 in level and any(level) for level in levels):
            raise self._unknown(
                "its input_blocks are no series of residual blocks, each level with or without attention"
            )
        return levels, widths

    def _middle(self, down: list[list[int]]) -> int:
        depth = self._depth("middle_block.1")
        if depth and any(down[-1]) and depth != down[-1][0]:
            raise self._unknown(f"its middle has {depth} transformer layers, the level above {down[-1][0]}")
        return depth

    def _up(self, layers: list[int]) -> list[list[int]]:
        levels: list[list[int]] = []
        index = 0
        for count in reversed(layers):
            level = []
            for _ in range(count + 1):
                if f"output_blocks.{index}.0.in_layers.0.weight" not in self._shapes:
                    raise self._unknown(f"it has {layers} blocks on the way down, but no output_blocks.{index}")
                level.append(self._depth(f"output_blocks.{index}.1"))
                index += 1
            if 0 in level and any(level):
                raise self._unknown("some blocks of a level on its way up have attention and some have none")
            levels.append(level)
        return levels

    def _depth(self, block: str) -> int:
        start = f"{block}.transformer_blocks."
        return len({key[len(start) :].split(".")[0] for key in self._shapes if key.startswith(start)})

    def _context(self) -> int:
        widths = {shape[1] for key, shape in self._shapes.items() if key.endswith("attn2.to_k.weight")}
        if len(widths) != 1:
            raise self._unknown(f"its cross-attention takes text of the widths {sorted(widths) or 'none'}")
        return widths.pop()

    def _unknown(self, reason: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._name} holds a {self._kind} of an unknown kind: {reason}", hint=self._hint)


def _one(level: list[int]) -> int | list[int]:
    """One number for a level whose blocks are equally deep; 1, which nothing reads, for one without attention."""
    return (level[0] or 1) if len(set(level)) == 1 else level
