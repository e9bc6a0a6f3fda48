"""Model folders as transformers and diffusers write them: ``config.json`` beside a file of weights, or several."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tstitch_engines.bundle import read
from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.read import CONFIG_BYTES
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import read_index
from tstitch_export.checkpoint.model_config import check_model_config

__all__ = [
    "choose_part",
    "choose_weights",
    "describe_folder",
    "files_of",
    "model_folder",
    "part_folder",
    "read_json",
    "weights_file",
]

_ENDINGS: Final = ("safetensors", "bin")
# Which of several is taken: full precision first, and the moving average, which is what pipelines draw with
_VARIANTS: Final[tuple[str, ...]] = ("", "fp32", "ema", "fp16", "bf16", "non_ema")
_SHARD: Final = re.compile(r"-\d+-of-\d+$")
# What diffusers' EMAModel writes into the config.json of a moving average, which is nothing of the model's
_OF_AVERAGES: Final = frozenset(
    {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
)


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
    folder = part_folder(path, parts) or path
    config = read_json(folder / "config.json")
    if config is None or str(config.get("_class_name")) not in kinds:
        raise BadCheckpoint(f"{path} {what}: it looks like {describe_folder(folder)}", hint=hint)
    check_model_config(config, folder / "config.json")
    return folder, {key: value for key, value in config.items() if key not in _OF_AVERAGES}


def part_folder(path: Path, parts: Sequence[str]) -> Path | None:
    """The first folder of ``parts`` in ``path`` that holds a model (``choose_part``); ``None`` where there is none."""
    part = choose_part(parts, lambda name: (path / name).is_file())
    return None if part is None else path / part


def choose_part(parts: Sequence[str], has: Callable[[str], bool]) -> str | None:
    """The first folder of ``parts`` with a ``config.json``; ``has``: whether a pipeline has the file of that name.

    A moving average (``PART_ema``, ``ema_PART``) goes before ``PART`` in the state of a training, not in a pipeline.
    """
    averages = [name for part in parts for name in (f"{part}_ema", f"ema_{part}")]
    ordered = [*parts, *averages] if has("model_index.json") else [*averages, *parts]
    return next((part for part in ordered if has(f"{part}/config.json")), None)


def weights_file(folder: Path, stems: Sequence[str]) -> Path:
    """The weights in ``folder``, for ``read_checkpoint``: one file, or the index of several (``choose_weights``).

    Raises ``BadCheckpoint`` where there are none.
    """
    names = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return folder / choose_weights(names, stems, where=folder)


def choose_weights(names: Iterable[str], stems: Sequence[str], *, where: Path | str) -> str:
    """Of the files of the folder ``where``, the weights: one file, or the index of several.

    Of several variants (``STEM.VARIANT.safetensors``) the first of ``_VARIANTS``; of one variant safetensors go before
    pickles, and one file before an index. Raises ``BadCheckpoint`` where there are none, or several unknown variants.
    """
    known = "|".join(map(re.escape, stems))
    # Both spellings of an index with a variant are in use: before .safetensors and before .json.
    pattern = re.compile(rf"({known})(?:\.([\w-]+?))?\.(safetensors|bin)(\.index(?:\.([\w-]+))?\.json)?")
    found: dict[str, list[tuple[int, bool, int, str]]] = {}
    names = sorted(names)
    for name in names:
        match = pattern.fullmatch(name)
        if match and not _SHARD.search(match[2] or ""):
            order = (_ENDINGS.index(match[3]), match[4] is not None, stems.index(match[1]), name)
            found.setdefault(match[2] or match[5] or "", []).append(order)
    usual = [variant for variant in _VARIANTS if variant in found]
    variants = usual or sorted(found)
    if not usual and len(variants) > 1:
        raise BadCheckpoint(
            f"{where} holds the variants {', '.join(variants)} of {stems[0]}, none of which is the usual one",
            hint="keep the one that you mean in a folder of its own, with config.json",
        )
    if variants:
        return min(found[variants[0]])[-1]
    whole = [f"{stem}.{ending}" for ending in _ENDINGS for stem in stems]
    shards = any(_SHARD.search(Path(name).stem) for name in names)
    raise BadCheckpoint(
        f"{where} has no {whole[0]} (nor {', '.join(whole[1:])}, nor an index of several files)",
        hint="download or copy the index too (*.index.json)" if shards else "download or copy the weights too",
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
