"""Model folders as transformers and diffusers write them: ``config.json`` beside one file of weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tstitch_engines.errors import BadCheckpoint

__all__ = ["describe_folder", "read_json", "weights_file"]


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; ``None`` where there is no such file. Raises ``BadCheckpoint`` for a damaged one."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{path} is damaged: {error}", hint="download or copy it again") from None
    if not isinstance(data, dict):
        raise BadCheckpoint(f"{path} holds no JSON object", hint="download or copy it again")
    return data


def weights_file(folder: Path, stems: Sequence[str]) -> Path:
    """The weights in ``folder``: ``STEM.safetensors`` first, ``STEM.fp16.safetensors`` where there is no other.

    Raises ``BadCheckpoint`` where there are none, or only shards.
    """
    names = [
        f"{stem}{variant}{suffix}"
        for variant in ("", ".fp16", ".non_ema")
        for suffix in (".safetensors", ".bin")
        for stem in stems
    ]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    shards = next(folder.glob("*.index*.json"), None)
    raise BadCheckpoint(
        f"{folder} has no {names[0]} (nor {', '.join(names[1:3])})"
        + (f"; {shards.name} says that the weights are in several files, which is not supported" if shards else ""),
        hint="save the model in one file: model.save_pretrained(DIR, max_shard_size='100GB')"
        if shards
        else "download or copy the weights too",
    )


def describe_folder(path: Path) -> str:
    """What ``path`` looks like, for messages about one that is something else."""
    if not path.exists():
        return "nothing: it does not exist"
    if (index := read_json(path / "model_index.json")) is not None:
        parts = ", ".join(key for key, value in index.items() if isinstance(value, list))
        return f"a diffusers {index.get('_class_name')} with the parts {parts}"
    if (config := read_json(path / "config.json")) is None:
        return "a folder without config.json"
    kind = config.get("_class_name") or ", ".join(map(str, config.get("architectures") or ())) or "model of no class"
    return f"a {kind}"
