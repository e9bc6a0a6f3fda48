"""How CLIP text towers are stored: transformers folders and the original single files, under one set of names.

The names are those of ``model.ClipText``. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREFIXES", "Piece", "Shapes", "find_tower", "name_pieces", "take"]

# Where a whole pipeline's single file keeps each text encoder: part -> (prefix, whether it is stored as OpenCLIP does).
# Stable Diffusion 1.x, 2.x, SDXL and its refiner, in the names of github.com/Stability-AI/generative-models.
PREFIXES: Final[dict[str, tuple[tuple[str, bool], ...]]] = {
    "text_encoder": (
        ("cond_stage_model.transformer.", False),
        ("cond_stage_model.model.", True),
        ("conditioner.embedders.0.transformer.", False),
    ),
    "text_encoder_2": (("conditioner.embedders.1.model.", True), ("conditioner.embedders.0.model.", True)),
}

_OPEN: Final = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_BLOCK: Final = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_OPEN_QKV: Final = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_IGNORED: Final = ("embeddings.position_ids", "logit_scale", "attn_mask")  # buffers, and what only training uses


@dataclass(frozen=True)
class Piece:
    """A parameter as a part of a stored tensor: ``third`` of its rows (0 to 2), or all of it, maybe transposed."""

    source: str
    third: int | None = None
    transposed: bool = False

    def shape(self, stored: Shapes) -> tuple[int, ...]:
        shape = stored[self.source]
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    def tensor(self, stored: Mapping[str, Tensor]) -> Tensor:
        tensor = stored[self.source]
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.t() if self.transposed else tensor


def find_tower(shapes: Shapes, part: str) -> tuple[str, bool] | None:
    """Prefix and style of ``part`` in a single file; ``None`` where it has none."""
    for prefix, is_open in PREFIXES[part]:
        if any(name.startswith(prefix) for name in shapes):
            return prefix, is_open
    return None


def name_pieces(shapes: Shapes, *, prefix: str = "", is_open: bool = False) -> dict[str, Piece]:
    """Parameter -> where it is stored. Raises ``BadCheckpoint`` for a tensor that no text tower has."""
    pieces: dict[str, Piece] = {}
    for source in shapes:
        if not source.startswith(prefix):
            continue
        name = source.removeprefix(prefix)
        if is_open:
            pieces |= _open_pieces(name, source)
            continue
        plain = name.removeprefix("text_model.")  # transformers 5 leaves it out where there is no projection
        if plain not in _IGNORED:
            pieces[plain] = Piece(source)
    return pieces


def _open_pieces(name: str, source: str) -> dict[str, Piece]:
    if name in _IGNORED:
        return {}
    if qkv := _OPEN_QKV.fullmatch(name):
        layer, kind = qkv.groups()
        return {
            f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}": Piece(source, third=third)
            for third, letter in enumerate("qkv")
        }
    if (block := _OPEN_BLOCK.fullmatch(name)) and block[2] in _OPEN:
        return {f"encoder.layers.{block[1]}.{_OPEN[block[2]]}.{block[3]}": Piece(source)}
    match name:
        case "token_embedding.weight":
            return {"embeddings.token_embedding.weight": Piece(source)}
        case "positional_embedding":
            return {"embeddings.position_embedding.weight": Piece(source)}
        case "ln_final.weight" | "ln_final.bias":
            return {f"final_layer_norm.{name.removeprefix('ln_final.')}": Piece(source)}
        case "text_projection":
            return {"text_projection.weight": Piece(source, transposed=True)}
    raise BadCheckpoint(
        f"{source} is no tensor of an OpenCLIP text tower",
        hint="give the text_encoder folder of a diffusers pipeline instead",
    )


def take(pieces: Mapping[str, Piece], shapes: Shapes, wanted: Shapes, *, unused: frozenset[str], what: str) -> None:
    """Raises ``BadCheckpoint`` unless the pieces are exactly ``wanted``; layers in ``unused`` may be there or not."""
    for name, shape in wanted.items():
        got = pieces[name].shape(shapes) if name in pieces else None
        if got != shape:
            raise BadCheckpoint(
                f"{what} is no CLIP text tower of this size: {name} is {list(got) if got else 'missing'}; "
                f"wanted is {list(shape)}",
                hint="copy config.json and the weights from the same model",
            )
    for name in pieces:
        if name not in wanted and not any(name.startswith(prefix) for prefix in unused):
            raise BadCheckpoint(
                f"{what} has the tensor {pieces[name].source}, which no CLIP text tower has",
                hint="give the text_encoder folder of a Stable Diffusion pipeline, or its single file",
            )
