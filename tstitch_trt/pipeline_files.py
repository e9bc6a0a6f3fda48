"""A loaded diffusers pipeline as files: what a bundle is built from, and the hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tstitch_engines.errors import BadInput, PairMismatch
from tstitch_engines.files import hash_file

__all__ = ["check_weights", "module_hash", "path_hash", "save_large", "save_small"]

# The keys of a scheduler's configuration that say how the model was trained; the others can be changed at any call
TRAINED: Final = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "num_train_timesteps",
    "prediction_type",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def check_weights(module: Any, what: str) -> None:
    """Raises ``BadInput`` where the parameters are not what the module computes with, or are not there."""
    kinds = {type(part).__name__ for part in module.modules()}
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise BadInput(
            f"{what} has LoRA layers beside its weights", hint="fuse them first: pipe.fuse_lora(), then "
            "pipe.unload_lora_weights()"
        )  # fmt: skip
    if any(parameter.is_meta for parameter in module.parameters()):
        raise BadInput(
            f"{what} has parameters without values (sequential offloading moves them away)",
            hint="load the pipeline without enable_sequential_cpu_offload",
        )
    if adapters := sorted(kind for kind in kinds if "IPAdapter" in kind):
        raise BadInput(f"{what} has an IP-Adapter ({adapters[0]})", hint="take it away: pipe.unload_ip_adapter()")
    if any(getattr(part, "b1", None) is not None for part in module.modules()):
        raise BadInput(f"{what} runs with FreeU, which engines do not have", hint="switch it off: pipe.disable_freeu()")


def module_hash(module: Any) -> str:
    """The sha256 of a diffusers module: its configuration, and every tensor's name, type, shape and bytes."""
    import torch

    found = hashlib.sha256()
    config = {key: value for key, value in dict(module.config).items() if not key.startswith("_")}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def path_hash(path: Path) -> str:
    """The sha256 of a checkpoint: a file's, or of the names and contents of all that makes a folder's denoiser."""
    if path.is_file():
        return hash_file(path)[0]
    found = hashlib.sha256()
    for file in _files(path):
        found.update(f"{file.relative_to(path)} {hash_file(file)[0]}\n".encode())
    return found.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Of a pipeline folder the UNet and what is said about it; of a model folder all."""
    whole = (path / "unet").is_dir()
    parts = [path / "unet", path / "scheduler"] if whole else [path]
    for part in parts:
        yield from sorted(file for file in part.rglob("*") if file.is_file())
    if whole and (path / "vae" / "config.json").is_file():
        yield path / "vae" / "config.json"


def save_large(pipe: Any, folder: Path) -> dict[str, Path]:
    """Writes denoiser, VAE and scheduler of ``pipe`` as a pipeline folder; returns the paths of other parts."""
    folder.mkdir()
    for name in ("unet", "vae"):
        _save(getattr(pipe, name), folder / name)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(dict(pipe.config), default=str))
    if getattr(pipe, "controlnet", None) is None:
        return {}
    controlnet = folder.parent / "controlnet"
    _save(pipe.controlnet, controlnet)
    return {"controlnet": controlnet}


def _save(module: Any, folder: Path) -> None:
    """Without where it was loaded from, so that equal weights are equal files."""
    module.save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_small(small: Any, pipe: Any, large: Path, folder: Path) -> Path:
    """A path that the small member can be built from.

    A module or a bare UNet folder says nothing of its conventions: it gets those of ``pipe``. Of a whole pipeline the
    UNet and its conventions are taken. Raises ``PairMismatch`` for one that reads text in its own way.
    """
    if isinstance(small, Path) and small.is_file():
        return small
    folder.mkdir()
    (folder / "vae").symlink_to(large / "vae", target_is_directory=True)
    if not isinstance(small, Path):
        _save(small, folder / "unet")
    elif (small / "unet").is_dir():
        _check_text(small, pipe)
        for name in ("unet", "scheduler"):
            if (small / name).is_dir():
                (folder / name).symlink_to(small.resolve() / name, target_is_directory=True)
        if (small / "vae").is_dir():
            (folder / "vae").unlink()
            (folder / "vae").symlink_to(small.resolve() / "vae", target_is_directory=True)
    else:
        (folder / "unet").symlink_to(small.resolve(), target_is_directory=True)
    if not (folder / "scheduler").is_dir():
        (folder / "scheduler").symlink_to(large / "scheduler", target_is_directory=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": type(pipe).__name__}))
    return folder


def _check_text(small: Path, pipe: Any) -> None:
    """The pipeline's text encoders serve both members."""
    import torch

    for name in ("text_encoder", "text_encoder_2"):
        own = getattr(pipe, name, None)
        if own is None or not (small / name / "config.json").is_file():
            continue
        theirs = type(own).from_pretrained(small / name, torch_dtype=own.dtype)
        mine, other = _plain(own.state_dict()), _plain(theirs.state_dict())
        if mine.keys() != other.keys() or any(not torch.equal(mine[key].cpu(), other[key].cpu()) for key in mine):
            raise PairMismatch(
                f"the small pipeline {small.name} has another {name} than the pipeline it is to accelerate",
                hint="build the pair with tstitch-trt build, which gives each member its own; or give the small "
                "UNet alone where it was trained with the pipeline's text encoder",
            )


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without LoRA layers, and without what is no weight."""
    return {
        key.replace(".base_layer", ""): tensor
        for key, tensor in state.items()
        if ".lora_" not in key and tensor.is_floating_point()
    }
