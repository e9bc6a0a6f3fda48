"""LoRAs fused into a model when it is built: W + weight * alpha / rank * up @ down (arXiv 2106.09685).

``parse_loras`` reads the option, ``check_loras`` refuses a LoRA for another model before any weight is read,
``lora_deltas`` gives what is added and ``fuse`` adds it. A family gives the shapes of its modules and their other
spellings, so that UNets and text encoders go through the same code.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.read import decode_json
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.checkpoint.checkpoint import SAFETENSORS, read_checkpoint
from tstitch_export.checkpoint.folder import read_json
from tstitch_export.checkpoint.signatures import Shapes
from tstitch_export.families.base import LoraTarget, LoraUse
from tstitch_export.families.lora.keys import LoraLayer, lora_layers, lora_looks_like

if TYPE_CHECKING:
    from torch import Tensor

    from tstitch_export.hub.checkpoints import Checkpoints

__all__ = ["LORA_OPTION", "check_loras", "describe_loras", "fuse", "locate_loras", "lora_deltas", "parse_loras"]

_log = logging.getLogger(__name__)

Delta = Callable[[], NDArray[np.float32]]

LORA_OPTION: Final = (
    str,
    "LoRAs to fuse: FILE[:WEIGHT], also of Hugging Face, several with commas; the weight is 1 by default",
)


_CHANGING: Final = ("pissa", "olora", "corda", "loftq")  # how PEFT starts a LoRA; of PiSSA also with a number
_AGAIN: Final = "download or copy it again"
_Alpha = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
# Names of modules and no more: PEFT takes any regular expression, and some of those never end
_ModulePattern = Annotated[str, msgspec.Meta(pattern=r"^\^?[\w.\\-]{1,200}\$?$")]


class _Settings(msgspec.Struct, frozen=True):
    """Keys of PEFT's ``LoraConfig`` that change what a LoRA's tensors mean."""

    lora_alpha: _Alpha | None = None
    alpha_pattern: dict[_ModulePattern, _Alpha] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    layer_replication: list[list[int]] | None = None
    init_lora_weights: bool | str | None = None

    @property
    def other_method(self) -> str | None:
        """What makes it more than a sum of products, where something does."""
        if self.use_dora:
            return "DoRA"
        if self.layer_replication:
            return "a LoRA of repeated layers (layer_replication)"
        start = str(self.init_lora_weights).lower()
        return (
            f"a LoRA that changes the weights below it (init_lora_weights = {start!r})"
            if start.startswith(_CHANGING)
            else None
        )


def parse_loras(text: str | None) -> tuple[LoraUse, ...]:
    """``"style.safetensors:0.8,lcm.safetensors"``; paths are relative to the working directory. Raises ``BadInput``."""
    return tuple(LoraUse(Path(path), weight) for path, weight in _split(text))


def locate_loras(text: str, checkpoints: Checkpoints) -> str:
    """``text`` with a path in place of every Hugging Face repository. Raises what ``Checkpoints.locate`` does."""
    found = []
    for item, (path, weight) in zip(text.split(",") if text.strip() else (), _split(text), strict=True):
        located = checkpoints.locate(path, "lora")
        found.append(item.strip() if located == Path(path) else f"{located}:{weight!r}")
    return ",".join(found)


def _split(text: str | None) -> list[tuple[str, float]]:
    found = []
    for item in (text or "").split(","):
        name, colon, number = item.strip().rpartition(":")
        path, weight = (name, _number(number)) if colon else (number, 1.0)
        if weight is None and colon and Path(item.strip()).suffix in SAFETENSORS:
            path, weight = item.strip(), 1.0  # a colon in the name
        if (text or "").strip() and (not path or weight is None or not math.isfinite(weight)):
            raise BadInput(
                f"lora is {text!r}; allowed is FILE.safetensors[:WEIGHT], several with commas",
                hint="e.g. --option large.lora=style.safetensors:0.8,lcm.safetensors",
            )
        if path and weight is not None:
            found.append((path, weight))
    return found


def describe_loras(uses: Sequence[LoraUse]) -> str:
    """What a manifest says of them: names and weights, in order."""
    return ",".join(f"{use.path.name}:{use.weight:g}" for use in uses)


def check_loras(uses: Sequence[LoraUse], target: LoraTarget, *, model: str) -> None:
    """Raises ``BadCheckpoint`` unless every layer that a file has for the part ``target`` fits a module of ``model``.

    A file must have something for the UNet; for a text encoder it may have nothing.
    """
    for use in uses:
        layers = _matched(use, target, model)
        parts = {layer.part for layer in lora_layers(use.path, read_checkpoint(use.path).shapes)}
        _log.log(
            logging.INFO if layers else logging.WARNING,
            "%s: %d layers for the %s of %s",
            *(use.path.name, len(layers), target.part.replace("_", " "), model),
        )
        for other in sorted(parts - {"unet"}) if target.part == "unet" else ():
            _log.warning(
                "%s has layers for the %s too, which are fused only where that part is given them: --lora %s=%s:%g",
                *(use.path.name, other.replace("_", " "), other, use.path, use.weight),
            )


def fuse(state: dict[str, Tensor], uses: Sequence[LoraUse], target: LoraTarget, *, model: str) -> None:
    """Adds the LoRAs to the weights ``state`` of ``target``, in float32. Raises what ``check_loras`` does."""
    import torch

    for use in uses:
        for key, delta in lora_deltas(use, target, model=model):
            state[key] = state[key].float() + torch.from_numpy(delta())


def lora_deltas(use: LoraUse, target: LoraTarget, *, model: str) -> list[tuple[str, Delta]]:
    """What a file adds to the weights: their keys in the state dict, and functions that compute it, float32. No torch.

    A key comes twice where the file has two layers for it. Raises what ``check_loras`` does.
    """
    matched = _matched(use, target, model)
    arrays = read_checkpoint(use.path).arrays()
    settings = _settings(use.path, target.part)

    def delta(layer: LoraLayer, module: str) -> NDArray[np.float32]:
        pieces = {piece: arrays[key]().astype(np.float32) for piece, key in layer.keys.items()}
        scale = np.float32(use.weight * _scale(pieces, module, settings))
        return scale * _product(pieces).reshape(target.shapes[f"{module}.weight"])

    return [(f"{module}.weight", partial(delta, layer, module)) for layer, module in matched]


def _product(pieces: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """``up @ down``, through the middle convolution where there is one (LoCon, Tucker decomposition)."""
    down, up = (pieces[name].reshape(len(pieces[name]), -1) for name in ("down", "up"))
    if "mid" not in pieces:
        return up @ down
    product: NDArray[np.float32] = np.einsum("or,rsyx,si->oiyx", up, pieces["mid"], down, optimize=True)
    return product


def _scale(pieces: Mapping[str, NDArray[np.float32]], module: str, settings: _Settings) -> float:
    rank = pieces["down"].shape[0]
    alpha = settings.lora_alpha
    if "alpha" in pieces:
        alpha = float(pieces["alpha"].reshape(-1)[0]) if pieces["alpha"].size == 1 else math.nan
        if not math.isfinite(alpha):
            raise BadCheckpoint(f"the LoRA's alpha of {module} is no finite number", hint=_AGAIN)
    for pattern, value in (settings.alpha_pattern or {}).items():
        if "alpha" not in pieces and re.fullmatch(rf"(.*\.)?({pattern})", module):  # as PEFT matches it
            alpha = value
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if settings.use_rslora else rank)


def _matched(use: LoraUse, target: LoraTarget, model: str) -> list[tuple[LoraLayer, str]]:
    shapes, part, stored = target.shapes, target.part, read_checkpoint(use.path).shapes
    layers = lora_layers(use.path, stored)
    wanted = [layer for layer in layers if layer.part == part]
    modules = {_spelt(alias): module for alias, module in target.aliases.items()}
    modules |= {_spelt(key[: -len(".weight")]): key[: -len(".weight")] for key in shapes if key.endswith(".weight")}
    found, problem = [], None
    for layer in wanted:
        module = modules.get(_spelt(layer.name))
        if module is None:
            problem = problem or f"the model has no {layer.name}"
        elif (got := _shape(layer, stored)) != (want := _padded(shapes[f"{module}.weight"])):
            problem = problem or f"{module} is {_text(want)}, the LoRA is for {_text(got)}"
        else:
            found.append((layer, module))
    if len(found) < len(wanted) or (part == "unet" and not wanted):
        raise BadCheckpoint(
            f"{use.path.name} is a LoRA for another model than {model}: {len(found)} of its {len(wanted)} "
            f"{part.replace('_', ' ')} layers match ({problem or 'it has none'}); it looks like "
            f"{lora_looks_like(layers, stored)}",
            hint="give one that was trained for this model, or leave the option lora away",
        )
    if method := _settings(use.path, part).other_method:
        raise BadCheckpoint(
            f"{use.path.name} is {method}, not a plain LoRA",
            hint="merge it with the tool that made it, and give the merged model",
        )
    return found


def _shape(layer: LoraLayer, stored: Shapes) -> tuple[int, ...]:
    """The product's shape: (out, in, kernel height, kernel width). (0,) where down, mid and up don't fit together."""
    down, up = _padded(stored[layer.keys["down"]]), _padded(stored[layer.keys["up"]])
    kernel = down[2:]
    if 0 in (*down, *up):
        return (0,)
    if "mid" in layer.keys:
        mid = _padded(stored[layer.keys["mid"]])
        if down[2:] != (1, 1) or mid[:2] != (up[1], down[0]):
            return (0,)
        kernel = mid[2:]
    elif up[1] != down[0]:
        return (0,)
    return (up[0], down[1], *kernel) if up[2:] == (1, 1) else (0,)


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix as a convolution of one pixel."""
    return (*shape, *(1,) * (4 - len(shape)))


def _text(shape: tuple[int, ...]) -> str:
    return (
        "x".join(map(str, shape if shape[2:] != (1, 1) else shape[:2])) if len(shape) > 1 else "factors that don't fit"
    )


def _spelt(name: str) -> str:
    """One spelling for ``down_blocks.0.attn1.to_q`` and ``down_blocks_0_attn1_to_q``."""
    return name.replace(".", "_")


def _settings(path: Path, part: str) -> _Settings:
    """What PEFT notes about a LoRA besides its tensors: in the file (diffusers), or in ``adapter_config.json``."""
    checkpoint = read_checkpoint(path)
    noted: Mapping[str, Any] = {}
    place, start = path, f"{part}."
    if text := checkpoint.metadata.get("lora_adapter_metadata"):
        try:
            noted = {key.removeprefix(start): v for key, v in dict(decode_json(text)).items() if key.startswith(start)}
        except (ValueError, TypeError) as error:
            raise BadCheckpoint(f"{path.name}: its lora_adapter_metadata is damaged: {error}", hint=_AGAIN) from None
    elif any(key.startswith("base_model.model.") for key in checkpoint.shapes):
        place = path.parent / "adapter_config.json"
        noted = read_json(place) or {}
    try:
        return msgspec.convert(noted, _Settings)
    except msgspec.ValidationError as error:
        raise BadCheckpoint(f"{place.name} says of the LoRA what can't be: {error}", hint=_AGAIN) from None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
