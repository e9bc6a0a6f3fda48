"""Which files of a repository are needed: those that the readers of checkpoints would choose in a copy of all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import SAFETENSORS
from tstitch_export.checkpoint.folder import choose_part, choose_weights

__all__ = ["Selection", "select", "select_component"]

_DIFFUSERS: Final = ("diffusion_pytorch_model",)
_STEMS: Final[Mapping[str, tuple[str, ...]]] = {  # of the weights, by the folder of a pipeline
    **dict.fromkeys(("text_encoder", "text_encoder_2"), ("model", "pytorch_model")),
    "class_embedder": (*_DIFFUSERS, "model"),
}
_TOKENIZERS: Final = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_TOKENIZER_FILES: Final = (
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
# What the pipeline that is given for it has it in
_FOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "member": ("unet", "transformer"),
    "text_encoder": ("text_encoder", "text_encoder_2"),
    "text_encoder_2": ("text_encoder_2", "text_encoder"),
    "vae_decoder": ("vae", "vqvae"),
    "vae_encoder": ("vae", "vqvae"),
    "controlnet": ("controlnet",),
}
_BESIDE: Final = ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json")  # of a pipeline
_PEFT: Final = "adapter_model.safetensors"
_FILE_NAMES: Final[Mapping[str, tuple[str, ...]]] = {  # where a repository is given for a file
    "lora": ("pytorch_lora_weights.safetensors", _PEFT),
    "textual_inversion": ("learned_embeds.safetensors", "learned_embeds.bin"),
}
_SHOWN: Final = 8  # files that a message lists


class Selection(NamedTuple):
    """``path``: the file or folder to read, empty for the whole repository. ``files``: what must be there for it."""

    path: str
    files: tuple[str, ...]


def select(names: Collection[str], path: str, kind: str, *, where: str, whole: bool = True) -> Selection:
    """What of a repository's files ``names`` is needed for a network, given as the file or folder ``path`` in it.

    ``kind``: ``member``, the name of a part, ``lora``, ``textual_inversion`` or ``tokenizer``. Of a pipeline only the
    member itself is selected, and what is said of it (scheduler, scaling); ``select_component`` has the rest. An index
    stands for the files that it lists. ``where`` is the repository's name in messages.

    Without ``whole`` the names are those of a copy that may lack some files: where it can't be told whether it does, it
    does. Raises ``BadCheckpoint`` for files that are missing.
    """
    names = frozenset(names)
    if path in names:
        return Selection(path, _with_beside(names, path, kind, whole=whole))
    start = path and f"{path}/"
    if not any(name.startswith(start) for name in names):
        raise BadCheckpoint(
            f"{where} has no {path or 'files'}; it has {_listed(names)}", hint="check the spelling, or name another"
        )
    if kind in _FILE_NAMES:
        file = _only_file(names, start, kind, where, whole=whole)
        return Selection(file, _with_beside(names, file, kind, whole=whole))
    if kind == "tokenizer":
        return Selection(path, _of_tokenizer(names, path))
    part = choose_part(_FOLDERS[kind], lambda name: start + name in names)
    beside = [start + name for name in _BESIDE if start + name in names]
    if not whole and kind == "member" and f"{start}model_index.json" in names and len(beside) < len(_BESIDE):
        raise BadCheckpoint(f"{where} may have more", hint="download all of it")
    if part is not None:
        beside += select_component(names, path, "class_embedder", where=where) if kind == "member" else ()
        return Selection(path, (*beside, *select_component(names, path, part, where=where)))
    if f"{start}model_index.json" in names:
        return Selection(path, tuple(beside))  # the reader says what it has instead
    if f"{start}config.json" not in names:
        raise BadCheckpoint(
            f"{where}{path and '/'}{path} has no model_index.json and no config.json; it has {_listed(names, start)}",
            hint=f"name the file or folder, e.g. {where}/{_example(names, start)}",
        )
    folder = PurePosixPath(path).name
    own = kind if kind in _TOKENIZERS and folder not in _TOKENIZERS else folder
    above = path.rpartition("/")[0]
    table = select_component(names, above, "class_embedder", where=where) if kind == "member" and path else ()
    return Selection(path, (*table, *_of_model(names, path, own, where)))


def select_component(
    names: Collection[str], pipeline: str, part: str, *, where: str, expected: bool = False
) -> tuple[str, ...]:
    """The files of the folder ``part`` in the folder ``pipeline``; none where it has no such model.

    Raises ``BadCheckpoint`` for one without weights, and where one is ``expected`` and missing.
    """
    folder = f"{pipeline}{pipeline and '/'}{part}"
    known = f"{folder}/config.json" in names or (part == "class_embedder" and _inside(names, folder))
    if expected and not known:
        raise BadCheckpoint(f"{where} has no {folder}/config.json", hint="name another repository")
    return _of_model(names, folder, part, where) if known else ()


def _of_model(names: Collection[str], folder: str, part: str, where: str) -> tuple[str, ...]:
    """``config.json`` and weights; of a text encoder in a pipeline its tokenizer and the pipeline's index too."""
    start = folder and f"{folder}/"
    weights = choose_weights(
        _inside(names, folder), _STEMS.get(part, _DIFFUSERS), where=f"{where}{folder and '/'}{folder}"
    )
    found = [f"{start}config.json"] if f"{start}config.json" in names else []
    if part in _TOKENIZERS and folder:
        above = folder.rpartition("/")[0]
        found += _of_tokenizer(names, f"{above}{above and '/'}{_TOKENIZERS[part]}")
        found += [index] if (index := f"{above}{above and '/'}model_index.json") in names else []
    return (*found, f"{start}{weights}")


def _of_tokenizer(names: Collection[str], folder: str) -> tuple[str, ...]:
    start = folder and f"{folder}/"
    return tuple(start + name for name in _TOKENIZER_FILES if start + name in names)


def _with_beside(names: Collection[str], file: str, kind: str, *, whole: bool) -> tuple[str, ...]:
    """``file``, and what readers look for beside it. Raises ``BadCheckpoint`` where PEFT's scale may be missing."""
    path = PurePosixPath(file)
    settings = path.with_name("adapter_config.json" if kind == "lora" else "config.json")
    if kind == "lora" and not whole and path.name == _PEFT and str(settings) not in names:
        raise BadCheckpoint(f"there is no {settings}, which has the scale of {file}", hint="download it too")
    beside = (str(other) for other in (settings, path.with_suffix(".yaml")) if other != path)
    return (file, *(name for name in beside if name in names))


def _only_file(names: Collection[str], start: str, kind: str, where: str, *, whole: bool) -> str:
    usual = [start + name for name in _FILE_NAMES[kind] if start + name in names]
    others = [start + name for name in _inside(names, start.rstrip("/")) if name.endswith(SAFETENSORS)]
    if usual or (whole and len(others) == 1):
        return (usual or others)[0]
    raise BadCheckpoint(
        f"{where}{start and '/'}{start.rstrip('/')} is no single file: it has {_listed(names, start)}",
        hint=f"name the file, e.g. {where}/{_example(names, start)}",
    )


def _inside(names: Collection[str], folder: str) -> list[str]:
    """The names of the files in ``folder`` itself."""
    start = folder and f"{folder}/"
    return sorted(name[len(start) :] for name in names if name.startswith(start) and "/" not in name[len(start) :])


def _listed(names: Collection[str], start: str = "") -> str:
    found = sorted({start + name[len(start) :].partition("/")[0] for name in names if name.startswith(start)})
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _example(names: Collection[str], start: str) -> str:
    found = [name for name in sorted(names) if name.startswith(start)]
    return next((name for name in found if name.endswith(SAFETENSORS)), found[0])
