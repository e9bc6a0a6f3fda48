"""Single-file ControlNets: what their shapes say, and diffusers' name of every tensor. No torch.

Either the original layout (github.com/lllyasviel/ControlNet, alone or within a whole pipeline under
``control_model.``), or diffusers' names without a ``config.json``. Both are read through the original names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes, looks_like
from tstitch_export.families.unet.config import UNetConfig
from tstitch_export.families.unet.layout import down_names, rename, way_down

__all__ = ["control_config", "control_names"]

_PREFIX: Final = "control_model."
_HINT: Final = "give a ControlNet for Stable Diffusion 1.x, 2.x or SDXL: a single file, or a diffusers folder"
# What tells a ControlNet: in the original layout, and in diffusers'
_SIGNATURES: Final = (
    ("input_hint_block.0.weight", "zero_convs.0.0.weight", "input_blocks.0.0.weight"),
    ("controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight", "conv_in.weight"),
)
_RESNET: Final = re.compile(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")


def control_config(shapes: Shapes, *, name: str) -> UNetConfig:
    """The diffusers configuration of the ControlNet in a file; ``name`` is the file's, for messages.

    Raises ``BadCheckpoint`` saying what the file looks like when it holds none, or one of an unknown kind.
    """
    inside = _inside(shapes, name)
    originals = _originals(inside)
    if originals is not None:
        back = {theirs: ours for ours, theirs in originals.items()}
        theirs = rename(inside, back, name=name, kind="ControlNet", hint=_HINT)
        inside = {theirs[key]: shape for key, shape in inside.items()}
    raw = way_down(inside, name=name, kind="ControlNet", hint=_HINT)
    layers = set(raw["layers_per_block"])
    if len(layers) != 1:
        raise BadCheckpoint(
            f"{name} holds a ControlNet of an unknown kind: its levels have {raw['layers_per_block']} blocks; allowed "
            "is the same number",
            hint=_HINT,
        )
    (raw["layers_per_block"],) = layers
    picture = [inside[key][0] for key in _hints(inside)]
    raw |= {
        "conditioning_channels": inside["input_hint_block.0.weight"][1],
        "conditioning_embedding_out_channels": [picture[0], *picture[2:-1:2]],
    }
    config = UNetConfig(raw)
    rename(inside, _names(config), name=name, kind="ControlNet", hint=_HINT)
    return config


def control_names(keys: Iterable[str], config: UNetConfig, *, name: str) -> dict[str, str]:
    """Each key of the file that is the ControlNet's -> diffusers' name."""
    keys = list(keys)
    inside = _inside(dict.fromkeys(keys, ()), name)
    own = {key: key for key in inside} if _originals(inside) is not None else None
    names = own or rename(inside, _names(config), name=name, kind="ControlNet", hint=_HINT)
    prefix = _PREFIX if any(key.startswith(_PREFIX) for key in keys) else ""
    return {prefix + key: ours for key, ours in names.items()}


def _inside(shapes: Shapes, name: str) -> dict[str, tuple[int, ...]]:
    """The ControlNet's tensors without prefix."""
    inside = {key.removeprefix(_PREFIX): shape for key, shape in shapes.items() if key.startswith(_PREFIX)}
    inside = inside or dict(shapes)
    if "lora_controlnet" in shapes:
        raise BadCheckpoint(f"{name} is a Control-LoRA, the difference of a ControlNet to one certain UNet", hint=_HINT)
    if not any(all(key in inside for key in keys) for keys in _SIGNATURES):
        raise BadCheckpoint(f"{name} is no ControlNet: it looks like {looks_like(shapes)}", hint=_HINT)
    return inside


def _names(config: UNetConfig) -> dict[str, str]:
    """diffusers' module names -> the original ones."""
    blocks = config.raw["conditioning_embedding_out_channels"]
    hints = ["conv_in", *(f"blocks.{n}" for n in range(2 * (len(blocks) - 1))), "conv_out"]
    return {
        **down_names(config),
        **{f"controlnet_cond_embedding.{part}": f"input_hint_block.{2 * n}" for n, part in enumerate(hints)},
        **{f"controlnet_down_blocks.{n}": f"zero_convs.{n}.0" for n in range(len(config.residuals) - 1)},
        "controlnet_mid_block": "middle_block_out.0",
    }


def _hints(shapes: Shapes) -> list[str]:
    """The convolutions that embed the picture, in their order."""
    found = (re.fullmatch(r"input_hint_block\.(\d+)\.weight", key) for key in shapes)
    return [f"input_hint_block.{n}.weight" for n in sorted(int(match[1]) for match in found if match)]


def _originals(inside: Shapes) -> dict[str, str] | None:
    """Where the names are diffusers' own: the original ones of all modules, from counting; else ``None``."""
    if "input_hint_block.0.weight" in inside:
        return None
    counted: dict[int, int] = {}
    for key in inside:
        if match := _RESNET.fullmatch(key):
            counted[int(match[1])] = max(counted.get(int(match[1]), 0), 1 + int(match[2]))
    picture = [key for key in inside if re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d+\.weight", key)]
    raw: dict[str, Any] = {
        "block_out_channels": [1] * len(counted),
        "layers_per_block": [counted[level] for level in sorted(counted)],
        "conditioning_embedding_out_channels": [1] * (1 + len(picture) // 2),
        "addition_embed_type": "text_time" if "add_embedding.linear_1.weight" in inside else None,
    }
    return _names(UNetConfig(raw))
