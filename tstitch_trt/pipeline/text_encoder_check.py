"""Whether a small pipeline reads text as the one that it is to accelerate: by equal text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.errors import PairMismatch
from tstitch_trt.pipeline.weights import stored_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tstitch_export.families.clip_text.layout import Piece

__all__ = ["check_text_encoders", "check_text_inputs"]

_TOKENS: Final = "embeddings.token_embedding.weight"
_PARTS: Final = ("text_encoder", "text_encoder_2")


# What a UNet is given of the text encoders, as its configuration has it
_INPUTS: Final = (
    "cross_attention_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)


def check_text_inputs(small: Mapping[str, Any], large: Mapping[str, Any]) -> None:
    """Raises ``PairMismatch`` where the small UNet's configuration is for other text than the pipeline's UNet's."""
    for name in _INPUTS:
        own, theirs = small.get(name), large.get(name)
        if _plain(own) != _plain(theirs):
            raise PairMismatch(
                f"the small UNet has {name} {own}, the pipeline's has {theirs}: both read the pipeline's text encoders",
                hint="give a small UNet that was trained with text encoders such as the pipeline's",
            )


def _plain(value: Any) -> Any:
    """Sequences of one value mean the same as the value."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    return items[0] if items and all(item == items[0] for item in items) else items


def check_text_encoders(small: Path, pipe: Any) -> None:
    """Raises ``PairMismatch`` where the pipeline ``small``, a folder or a single file, has another text encoder.

    Weights that differ by the rounding to a shorter type are equal. LoRA layers of the loaded one do not count, nor do
    textual inversions. A bare UNet has none.
    """
    for part in _PARTS:
        own = getattr(pipe, part, None)
        theirs = None if own is None else _stored(small, part)
        if theirs is not None and not _equal(_loaded(own), theirs):
            raise PairMismatch(
                f"the small pipeline {small.name} has another {part} than the pipeline it is to accelerate",
                hint="give the small UNet alone where it was trained with the pipeline's text encoder; a bundle "
                "built by the command line lets each member have its own",
            )


def _stored(small: Path, part: str) -> dict[str, tuple[Tensor, torch.dtype]] | None:
    """The text encoder's tensors by their names in ``ClipText``, and what they are stored in; ``None`` without one."""
    import torch

    from tstitch_export.checkpoint.checkpoint import read_checkpoint
    from tstitch_export.checkpoint.folder import weights_file
    from tstitch_export.families.clip_text.layout import find_tower

    prefix, is_open = "", False
    if small.is_file():
        stored = read_checkpoint(small)
        tower = find_tower(stored.shapes, part)
        if tower is None:
            return None
        prefix, is_open = tower
    elif (small / part / "config.json").is_file():
        stored = read_checkpoint(weights_file(small / part, ("model", "pytorch_model")))
    else:
        return None
    state = {key: tensor for key, tensor in stored.tensors().items() if key.startswith(prefix)}
    types = {
        name: getattr(torch, stored.types[piece.source]) for name, piece in _pieces(state, prefix, is_open).items()
    }
    return {name: (tensor, types[name]) for name, tensor in _named(state, prefix=prefix, is_open=is_open).items()}


def _loaded(module: Any) -> dict[str, Tensor]:
    """Without LoRA layers, and without what is no weight."""
    state = {
        key.replace(".base_layer", ""): tensor
        for key, tensor in stored_weights(module).items()
        if ".lora_" not in key and tensor.is_floating_point()
    }
    return _named(state)


def _named(state: Mapping[str, Tensor], *, prefix: str = "", is_open: bool = False) -> dict[str, Tensor]:
    return {name: piece.tensor(state) for name, piece in _pieces(state, prefix, is_open).items()}


def _pieces(state: Mapping[str, Tensor], prefix: str, is_open: bool) -> dict[str, Piece]:
    from tstitch_export.families.clip_text.layout import name_pieces

    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return name_pieces(shapes, prefix=prefix, is_open=is_open)


def _equal(own: Mapping[str, Tensor], theirs: Mapping[str, tuple[Tensor, torch.dtype]]) -> bool:
    """Files of whole pipelines also hold layers that the loaded encoder does not have, since nothing reads them."""
    if not own.keys() <= theirs.keys():
        return False
    own, theirs = dict(own), dict(theirs)
    if _TOKENS in own:  # a textual inversion adds rows behind the others
        rows = min(len(own[_TOKENS]), len(theirs[_TOKENS][0]))
        own[_TOKENS], theirs[_TOKENS] = own[_TOKENS][:rows], (theirs[_TOKENS][0][:rows], theirs[_TOKENS][1])
    return all(_same(tensor, *theirs[name]) for name, tensor in own.items())


def _same(left: Tensor, right: Tensor, stored: torch.dtype) -> bool:
    """Whether one is the other, rounded to the type that it is kept in. Types of 8 bits are compared in float32."""
    import torch

    if left.shape != right.shape:
        return False
    left, right = left.detach().cpu(), right.cpu()
    return torch.equal(left.float(), right.to(left.dtype).float()) or torch.equal(
        left.to(stored).float(), right.float()
    )
