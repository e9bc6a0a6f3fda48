"""A loaded diffusers pipeline as files: what a bundle is built from, and the hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import ComponentName
from tstitch_engines.errors import BadInput

__all__ = ["check_weights", "module_hash", "path_hash", "save_large", "save_small", "unwrap_compiled"]


def unwrap_compiled(module: Any) -> Any:
    """The module itself where it was wrapped by ``torch.compile``."""
    return getattr(module, "_orig_mod", module)


def check_weights(module: Any, what: str) -> None:
    """Raises ``BadInput`` where the parameters are not what the module computes with, or are not there."""
    parts, weights = list(module.modules()), dict(module.named_parameters())
    if any(hasattr(part, "base_layer") for part in parts):
        raise BadInput(
            f"{what} has LoRA layers beside its weights", hint="fuse them first: pipe.fuse_lora(), then "
            "pipe.unload_lora_weights()"
        )  # fmt: skip
    if any(parameter.is_meta for parameter in weights.values()):
        raise BadInput(
            f"{what} has parameters without values (sequential offloading moves them away)",
            hint="load the pipeline without enable_sequential_cpu_offload",
        )
    if packed := [f"{name} holds {value.dtype}" for name, value in weights.items() if not value.is_floating_point()]:
        raise BadInput(
            f"{what} is quantised: {packed[0]}",
            hint="load it in float32, float16 or bfloat16; tstitch-trt quantise makes 8 bit members of a bundle",
        )
    if any(getattr(part, "padding_mode", "zeros") != "zeros" for part in parts):
        raise BadInput(f"{what} pads with something else than zeros", hint="undo it: engines are built from weights")
    if adapters := sorted(kind for part in parts if "IPAdapter" in (kind := type(part).__name__)):
        raise BadInput(f"{what} has an IP-Adapter ({adapters[0]})", hint="take it away: pipe.unload_ip_adapter()")
    if any(getattr(part, "b1", None) is not None for part in parts):
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
        _save(unwrap_compiled(getattr(pipe, name)), folder / name)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(dict(pipe.config), default=str))
    if getattr(pipe, "controlnet", None) is None:
        return {}
    controlnet = folder.parent / "controlnet"
    _save(unwrap_compiled(pipe.controlnet), controlnet)
    return {ComponentName.CONTROLNET: controlnet}


def _save(module: Any, folder: Path) -> None:
    """Without where it was loaded from, so that equal weights are equal files."""
    module.save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_small(small: Any, pipe: Any, large: Path, folder: Path) -> Path:
    """A pipeline folder that the small member can be built from.

    A module, a bare UNet folder or a single file says nothing of its conventions, but that some files are marked as
    predicting v: it gets those of ``pipe``. Of a whole pipeline the UNet and its conventions are taken.
    """
    folder.mkdir()
    whole = isinstance(small, Path) and (small / "unet").is_dir()
    if not isinstance(small, Path):
        _save(small, folder / "unet")
    elif small.is_file():
        _save_single(small, large / "scheduler", folder)
    else:
        (folder / "unet").symlink_to((small / "unet" if whole else small).resolve(), target_is_directory=True)
    for name in ("scheduler", "vae"):
        if not (folder / name).is_dir():
            own = whole and (small / name).is_dir()
            (folder / name).symlink_to((small if own else large).resolve() / name, target_is_directory=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": type(pipe).__name__}))
    return folder


def _save_single(file: Path, scheduler: Path, folder: Path) -> None:
    """The UNet of a single file as diffusers would save it; where the file states v, the scheduler says so."""
    from safetensors.torch import save_file

    from tstitch_export.families.unet.config import CLASS
    from tstitch_export.families.unet.source import read_state, read_unet

    source = read_unet(file)
    unet = folder / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": CLASS, **source.config}, indent=2) + "\n")
    state = read_state(source.layout, source.weights, source.config)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, unet / "diffusion_pytorch_model.safetensors")
    if source.facts.parametrisation == "v":
        (folder / "scheduler").mkdir()
        config = json.loads((scheduler / "scheduler_config.json").read_text())
        (folder / "scheduler/scheduler_config.json").write_text(
            json.dumps({**config, "prediction_type": "v_prediction"}, indent=2)
        )
