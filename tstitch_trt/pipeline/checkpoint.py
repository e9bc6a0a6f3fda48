"""A loaded diffusers pipeline as files: what a bundle is built from, and the hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import ComponentName
from tstitch_engines.errors import BadCheckpoint
from tstitch_trt.pipeline.code_origin import library_base
from tstitch_trt.pipeline.own_code import pipeline_class, scheduler_class
from tstitch_trt.pipeline.weights import weights_of
from tstitch_trt.pipeline.wrapped import unwrap_compiled

if TYPE_CHECKING:
    from tstitch_export.checkpoint.conventions import Conventions

__all__ = ["conventions_said", "module_hash", "path_hash", "save_large", "save_small"]

_log = logging.getLogger(__name__)


def module_hash(module: Any) -> str:
    """The sha256 of a diffusers module: its configuration, and every tensor's name, type, shape and bytes."""
    import torch

    found = hashlib.sha256()
    config = {key: value for key, value in dict(module.config).items() if not key.startswith("_")}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights_of(module).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def path_hash(path: Path) -> str:
    """The sha256 of a checkpoint: of the names and contents of what makes its denoiser. Raises ``BadCheckpoint``."""
    found, base = hashlib.sha256(), path.parent if path.is_file() else path
    for file in _files(path):
        found.update(f"{file.relative_to(base)} {hash_file(file)[0]}\n".encode())
    return found.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Of a pipeline folder the UNet and what is said about it; of a model folder all; of a file what it needs."""
    from tstitch_export.checkpoint.folder import files_of, part_folder

    if path.is_file():
        beside = (path.parent / "config.json", path.with_suffix(".yaml"))
        yield from (*files_of(path), *(file for file in beside if file.is_file()))
        return
    unet = part_folder(path, ("unet",))
    for part in [path] if unet is None else [unet, path / "scheduler"]:
        yield from sorted(file for file in part.rglob("*") if file.is_file())
    if unet is not None and (path / "vae" / "config.json").is_file():
        yield path / "vae" / "config.json"


def save_large(pipe: Any, folder: Path) -> dict[str, Path]:
    """Writes denoiser, VAE and scheduler of ``pipe`` as a pipeline folder; returns the paths of other parts."""
    folder.mkdir()
    for name in ("unet", "vae"):
        _save(unwrap_compiled(getattr(pipe, name)), folder / name)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    _name_class(folder / "scheduler/scheduler_config.json", scheduler_class(pipe.scheduler))
    index = {**pipe.config, "_class_name": pipeline_class(pipe).__name__}
    (folder / "model_index.json").write_text(json.dumps(index, default=str))
    if getattr(pipe, "controlnet", None) is None:
        return {}
    controlnet = folder.parent / "controlnet"
    _save(unwrap_compiled(pipe.controlnet), controlnet)
    return {ComponentName.CONTROLNET: controlnet}


def _save(module: Any, folder: Path) -> None:
    """As diffusers does, but in one file, and without where it was loaded from: equal weights are equal files."""
    from safetensors.torch import save_file

    module.save_config(folder)
    _name_class(folder / "config.json", library_base(type(module)).__name__)
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights_of(module).items()}
    own = {tensor.data_ptr(): name for name, tensor in weights.items()}  # files hold shared ones twice
    weights = {name: tensor if own[tensor.data_ptr()] == name else tensor.clone() for name, tensor in weights.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _name_class(file: Path, name: str) -> None:
    """Of a subclass that changes nothing the files are those of its base."""
    config: dict[str, Any] = {**json.loads(file.read_text()), "_class_name": name}
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_small(small: Any, pipe: Any, large: Path, folder: Path, said: Conventions) -> Path:
    """A pipeline folder that the small member can be built from; ``said``: the conventions that its options give.

    Of a whole pipeline the UNet and its conventions are taken. A module, a UNet folder without a scheduler or a single
    file has those of ``pipe`` where it says nothing itself. Raises ``BadCheckpoint`` for a single file that says
    nothing, where the pipeline's are not those that such files usually have.
    """
    from tstitch_export.checkpoint.folder import part_folder

    folder.mkdir()
    own_unet = part_folder(small, ("unet",)) if isinstance(small, Path) else None
    whole = own_unet is not None
    if not isinstance(small, Path):
        _save(small, folder / "unet")
    elif small.is_file():
        _log_notes(small, said)
        _save_single(small, folder / "unet", said)
    else:
        _log_notes(small, said)
        (folder / "unet").symlink_to((own_unet or small).resolve(), target_is_directory=True)
    if not (whole and (small / "scheduler" / "scheduler_config.json").is_file()):
        _write_training(small if isinstance(small, Path) else folder / "unet", large / "scheduler", folder, said)
    for name in ("scheduler", "vae"):
        if not (folder / name).is_dir():
            own = whole and (small / name).is_dir()
            (folder / name).symlink_to((small if own else large).resolve() / name, target_is_directory=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class(pipe).__name__}))
    return folder


def conventions_said(options: Mapping[str, Any]) -> Conventions:
    """What ``options`` of a build (``small.prediction``...) say of the small member's training. Raises ``BadInput``."""
    from tstitch_export.checkpoint.conventions import CONVENTION_OPTIONS, read_options
    from tstitch_export.families.options import typed

    own = {key.removeprefix("small."): value for key, value in options.items() if key.startswith("small.")}
    known = {key: value for key, value in own.items() if key in CONVENTION_OPTIONS}
    return read_options(typed(known, CONVENTION_OPTIONS, what="member 'small'"))


def _save_single(file: Path, unet: Path, said: Conventions) -> None:
    """The UNet of a single file as diffusers would save it."""
    from safetensors.torch import save_file

    from tstitch_export.families.unet.config import CLASS
    from tstitch_export.families.unet.source import read_state, read_unet

    source = read_unet(file, said)
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": CLASS, **source.config}, indent=2) + "\n")
    state = read_state(source.layout, source.weights, source.config)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, unet / "diffusion_pytorch_model.safetensors")


def _log_notes(small: Path, said: Conventions) -> None:
    """What is taken of several models in a checkpoint, which the files that are made of it no longer show."""
    from tstitch_export.checkpoint.checkpoint import read_checkpoint
    from tstitch_export.families.unet.source import read_unet

    source = read_unet(small, said)
    for note in (*read_checkpoint(source.weights[-1]).notes, *source.notes):
        _log.info("%s: %s", small.name, note)


def _write_training(small: Path, scheduler: Path, folder: Path, said: Conventions) -> None:
    """The pipeline's ``scheduler`` with what ``small`` says of its own training, where it says something."""
    from tstitch_engines.bundle.scheduler_config import read_training
    from tstitch_export.checkpoint.pipeline import scheduler_keys
    from tstitch_export.families.unet.source import read_unet

    config = json.loads((scheduler / "scheduler_config.json").read_text())
    own = read_unet(small, said).conventions(said, sure=small.is_file())
    if small.is_file():
        noise, prediction = read_training(config, where="the pipeline's scheduler")
        if own.prediction is None and prediction != "eps":
            rest = f"what it predicts; the pipeline predicts {prediction}, and files that say nothing usually eps"
            raise _silent(small, rest, "prediction", prediction)
        if own.zero_snr is None and noise.zero_terminal_snr:
            raise _silent(
                small, "whether its betas are rescaled to end without signal, as the pipeline's are", "zero_snr", "true"
            )
    if keys := scheduler_keys(own):
        (folder / "scheduler").mkdir()
        # A class that knows all of them, whichever the pipeline's is
        text = json.dumps({**config, "_class_name": "DDIMScheduler", **keys}, indent=2)
        (folder / "scheduler/scheduler_config.json").write_text(text)


def _silent(small: Path, what: str, option: str, value: str) -> BadCheckpoint:
    from tstitch_export.checkpoint.conventions import say

    return BadCheckpoint(f"{small.name} does not say {what}", hint=say(option, value).replace("MEMBER", "small"))
