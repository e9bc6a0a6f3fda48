"""Textual inversions (arXiv 2208.01618) in files of their own: vectors that a token of the prompt stands for.

As diffusers saves them (the tensor has the token's name), as AUTOMATIC1111 does (``string_to_param`` and a ``name``, or
``emb_params``), and for both text encoders of SDXL (``clip_l``, ``clip_g``). Without a name the file's is the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.checkpoint.checkpoint import Checkpoint, read_checkpoint
from tstitch_export.families.base import InversionUse
from tstitch_export.families.clip_text.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from tstitch_export.hub.checkpoints import Checkpoints

__all__ = [
    "INVERSION_OPTION",
    "check_inversions",
    "describe_inversions",
    "locate_inversions",
    "parse_inversions",
    "with_inversions",
]

INVERSION_OPTION: Final = (
    str,
    "textual inversions to add: FILE or TOKEN=FILE, also of Hugging Face, several with commas",
)
_PARTS: Final = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_NAMELESS: Final = (*_PARTS.values(), "emb_params", "*")
_MOST_VECTORS: Final = 10_000
_LONGEST: Final = 200  # characters of a token


def parse_inversions(text: str | None, part: str, width: int) -> tuple[InversionUse, ...]:
    """The option for a ``part`` whose tokens have ``width`` numbers each.

    Raises ``BadInput`` even for a damaged file: a text encoder that can't be read may be left out, this may not.
    """
    return tuple(_parse(item.strip(), part, width) for item in (text or "").split(",") if item.strip())


def locate_inversions(text: str, checkpoints: Checkpoints) -> str:
    """``text`` with a path in place of every Hugging Face repository. Raises what ``Checkpoints.locate`` does."""
    found = []
    for item in (item.strip() for item in text.split(",") if item.strip()):
        token, equals, path = ("", "", item) if Path(item).is_file() else item.rpartition("=")
        found.append(f"{token}{equals}{checkpoints.locate(path, 'textual_inversion')}")
    return ",".join(found)


def _parse(item: str, part: str, width: int) -> InversionUse:
    token, equals, path = item.rpartition("=")
    if not equals or Path(item).is_file():
        token, path = "", item
    file = Path(path)
    if not file.is_file():
        raise BadInput(
            f"textual_inversion is {item!r}, and {path!r} is no file",
            hint=f"e.g. --option {part}.textual_inversion=cat.safetensors, or <cat>=learned_embeds.bin",
        )
    try:
        stored = read_checkpoint(file)
    except BadCheckpoint as error:
        raise BadInput(error.message, hint=error.hint) from None
    name = _tensor_of(stored, part)
    shape = stored.shapes[name]
    vectors = shape[0] if len(shape) == 2 else 1
    if len(shape) not in (1, 2) or shape[-1] != width or not 1 <= vectors <= _MOST_VECTORS:
        raise BadInput(
            f"{file.name} has {name} of shape {list(shape)}; the {part} takes vectors of {width} numbers, [N, {width}]",
            hint="give a textual inversion that was trained for this text encoder",
        )
    token = token or _own_token(stored, name)
    if not token or not token.isprintable() or token != token.strip() or len(token) > _LONGEST:
        raise BadInput(
            f"the token of {file.name} is {shown(token)}; allowed are up to {_LONGEST} printable signs",
            hint=f"name it: --option {part}.textual_inversion=TOKEN={file}",
        )
    return InversionUse(file, name, token, vectors)


def _tensor_of(stored: Checkpoint, part: str) -> str:
    names = list(stored.shapes)
    if len(names) == 1 and names[0] not in _PARTS.values():
        return names[0]
    if _PARTS.get(part) in names:
        return _PARTS[part]
    raise BadInput(
        f"{stored.path.name} is no textual inversion for a {part}: its tensors are {', '.join(names[:5])}; allowed is "
        "one, or clip_l and clip_g for the two text encoders of SDXL",
        hint="give a file as diffusers or AUTOMATIC1111 saves them",
    )


def _own_token(stored: Checkpoint, name: str) -> str:
    if name not in _NAMELESS:
        return name
    own = stored.beside.get("name")
    return own if isinstance(own, str) and own else stored.path.name.partition(".")[0]


def describe_inversions(uses: Sequence[InversionUse]) -> str:
    """What a manifest says of them: names and tokens, in order."""
    return ",".join(f"{use.path.name}:{use.token}" for use in uses)


def check_inversions(uses: Sequence[InversionUse], tokenizer: ClipTokenizer) -> dict[str, int]:
    """The ids of all their tokens, behind those of ``tokenizer``. Raises ``BadInput`` for a token that it knows."""
    found: dict[str, int] = {}
    for use in uses:
        for token in use.tokens:
            if token in tokenizer.vocabulary or token in tokenizer.special or token in found:
                raise BadInput(
                    f"the token {token!r} of {use.path.name} is in the tokenizer already",
                    hint=f"give it another one: textual_inversion=TOKEN={use.path}",
                )
            found[token] = tokenizer.size + len(found)
    return found


def with_inversions(table: Tensor, uses: Sequence[InversionUse], size: int) -> Tensor:
    """The token embeddings ``[V,D]`` with those of the inversions from row ``size`` on."""
    import torch

    rows = [read_checkpoint(each.path).tensors()[each.name].float().reshape(each.vectors, -1) for each in uses]
    return torch.cat([table[:size], *rows, table[size + sum(len(row) for row in rows) :]])
