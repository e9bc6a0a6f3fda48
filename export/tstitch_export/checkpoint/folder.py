"""Model folders as transformers and diffusers write them: ``config.json`` beside a file of weights, or several."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from tstitch_engines.bundle import read
from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.read import CONFIG_BYTES
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import read_index
from tstitch_export.checkpoint.model_config import check_model_config

__all__ = ["describe_folder", "files_of", "model_folder", "read_json", "weights_file"]

_ENDINGS: Final = ("safetensors", "bin")


def read_json(path: Path, most: int = CONFIG_BYTES) -> dict[str, Any] | None:
    """The JSON object in ``path``, of at most ``most`` bytes; ``None`` where there is no such file.

    Raises ``BadCheckpoint`` for a damaged one.
    """
    try:
        data = read.read_json(path, most, infinite=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, DecodeError) as error:
        raise BadCheckpoint(f"{path} is damaged: {error}", hint="download or copy it again") from None
    if not isinstance(data, dict):
        raise BadCheckpoint(f"{path} holds no JSON object", hint="download or copy it again")
    return data


def model_folder(
    path: Path, parts: Sequence[str], kinds: Collection[str], *, what: str, hint: str
) -> tuple[Path, dict[str, Any]]:
    """The folder of a diffusers model and its ``config.json``: ``path``, or one of the ``parts`` of a pipeline there.

    Raises ``BadCheckpoint`` saying ``what`` (``is no DiT``) where its class is none of ``kinds``.
    """
    folder = next((path / part for part in parts if (path / part / "config.json").is_file()), path)
    config = read_json(folder / "config.json")
    if config is None or str(config.get("_class_name")) not in kinds:
        raise BadCheckpoint(f"{path} {what}: it looks like {describe_folder(folder)}", hint=hint)
    check_model_config(config, folder / "config.json")
    return folder, config


def weights_file(folder: Path, stems: Sequence[str]) -> Path:
    """The weights in ``folder``, for ``read_checkpoint``: one file, or the index of several.

    ``STEM.safetensors`` first, then ``STEM.safetensors.index.json``, then half-precision and other variants. Raises
    ``BadCheckpoint`` where there are none.
    """
    whole = [f"{stem}.{ending}" for ending in _ENDINGS for stem in stems]
    for variant in ("", ".fp16", ".non_ema"):
        names = [f"{stem}{variant}.{ending}" for ending in _ENDINGS for stem in stems]
        names += [f"{stem}.{ending}.index{variant}.json" for ending in _ENDINGS for stem in stems]
        names += [f"{stem}{variant}.{ending}.index.json" for ending in _ENDINGS for stem in stems]
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is not None:
            return found
    raise BadCheckpoint(
        f"{folder} has no {whole[0]} (nor {', '.join(whole[1:])}, nor an index of several files)",
        hint="download or copy the weights too",
    )


def files_of(weights: Path) -> tuple[Path, ...]:
    """The files that ``weights`` stands for, itself the last: an index comes after what it lists."""
    return (*read_index(weights), weights) if weights.suffix == ".json" else (weights,)


def describe_folder(path: Path) -> str:
    """What ``path`` looks like, for messages about one that is something else."""
    if not path.exists():
        return "nothing: it does not exist"
    if (index := read_json(path / "model_index.json")) is not None:
        parts = ", ".join(key for key, value in index.items() if isinstance(value, list))
        return f"a diffusers {index.get('_class_name')} with the parts {parts}"[:1000]
    if (config := read_json(path / "config.json")) is None:
        return "a folder without config.json"
    stated = config.get("architectures")
    kind = config.get("_class_name") or ", ".join(map(str, stated if isinstance(stated, list) else ()))
    return f"a {str(kind or 'model of no class')[:200]}"
