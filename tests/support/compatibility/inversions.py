"""Files of textual inversions, tried on the first text encoder of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from support.compatibility.markdown import attempt, code, grouped, outcome, table
from tstitch_export.families.clip_text.inversion import parse_inversions

__all__ = ["inversion_section"]

_WIDTH: Final = 8
_Make = Callable[[], Any]


def _vectors(count: int, width: int = _WIDTH) -> Any:
    import torch

    return torch.ones(count, width) if count else torch.ones(width)


_FILES: Final[Mapping[str, tuple[str, _Make]]] = {
    "diffusers: the token's name": ("learned.safetensors", lambda: {"<cat>": _vectors(0)}),
    "diffusers, several vectors": ("learned.safetensors", lambda: {"<cat>": _vectors(3)}),
    "diffusers, pickled": ("learned.bin", lambda: {"<cat>": _vectors(2)}),
    "AUTOMATIC1111: `string_to_param` and `name`": (
        "cat.pt", lambda: {"string_to_token": {"*": 265}, "string_to_param": {"*": _vectors(2)}, "name": "cat"},
    ),
    "AUTOMATIC1111: `emb_params`, named by its file": ("cat.safetensors", lambda: {"emb_params": _vectors(2)}),
    "SDXL: `clip_l` and `clip_g`": ("cat.safetensors", lambda: {"clip_l": _vectors(2), "clip_g": _vectors(2, 16)}),
    "for a text encoder of another width": ("cat.safetensors", lambda: {"<cat>": _vectors(2, 16)}),
    "two tokens in one file": ("cats.safetensors", lambda: {"<cat>": _vectors(1), "<dog>": _vectors(1)}),
}  # fmt: skip


def inversion_section(folder: Path) -> str:
    """``folder``: an empty one, for the files."""
    rows = [(kind, _tried(folder / name, make())) for kind, (name, make) in _FILES.items()]
    return "\n\n".join(
        [
            "## Textual inversions",
            "For `build --option text_encoder.textual_inversion=[TOKEN=]FILE`, and those in a pipeline's tokenizer.",
            table(("kinds of files", "outcome"), grouped(rows)),
        ]
    )


def _tried(path: Path, content: Any) -> str:
    import torch
    from safetensors.torch import save_file

    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    found, why = attempt(lambda: parse_inversions(str(path), "text_encoder", _WIDTH), without=[path.name])
    path.unlink()
    if found is None:
        return outcome("", why, {})
    (use,) = found  # type: ignore[misc]
    return f"taken as {code(use.token)}"
