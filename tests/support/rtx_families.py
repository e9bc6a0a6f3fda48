"""A tiny checkpoint of every model family and layout: what the tests compile with TensorRT-RTX for real.

A new family fails a test until it has an entry here: its name -> a name for each layout -> a function that writes a
checkpoint with random weights into a folder and says where it is. Of each family the first is tested always, the others
with the slow tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CHECKPOINTS", "Tiny"]


class Tiny(NamedTuple):
    """``path`` as ``tstitch-trt build`` would be given it, with the family's ``options``."""

    path: Path
    options: Mapping[str, Any] = {}


def _dit(folder: Path) -> Tiny:
    from safetensors.torch import save_file

    from support.dits import published_state

    path = folder / "DiT.safetensors"
    save_file(published_state(heads=2, depth=1), path)
    return Tiny(path, {"num_heads": 2})


def _dit_diffusers(folder: Path) -> Tiny:
    from support.dits import diffusers_folder

    diffusers_folder(folder / "DiT")
    return Tiny(folder / "DiT")


def _uvit(folder: Path) -> Tiny:
    from support.uvits import uvit_checkpoint

    path = folder / "uvit.safetensors"
    uvit_checkpoint(path, depth=3, heads=2)
    return Tiny(path, {"num_heads": 2, "time": "discrete"})


def _ldm(folder: Path) -> Tiny:
    from support.ldms import ldm_checkpoint

    ldm_checkpoint(folder / "ldm.safetensors")
    return Tiny(folder / "ldm.safetensors", {"num_heads": 2, "size": 8, "dynamic": True})


def _ldm_diffusers(kind: str) -> Callable[[Path], Tiny]:
    def write(folder: Path) -> Tiny:
        from support.ldms import ldm_folder

        ldm_folder(folder / "pipeline", kind=kind)
        return Tiny(folder / "pipeline", {"dynamic": True})

    return write


def _clip_text(folder: Path) -> Tiny:
    from support.tiny_families import clip_text_folder

    clip_text_folder(folder / "pipeline")
    return Tiny(folder / "pipeline" / "text_encoder")


def _unet(kind: str, **options: Any) -> Callable[[Path], Tiny]:
    """With the seeds of other tests, so that equal ones are exported once."""

    def write(folder: Path) -> Tiny:
        from support.tiny_families import unet_folder

        unet_folder(folder / "pipeline", kind, seed=len(kind))
        return Tiny(folder / "pipeline", options)

    return write


def _controlnet(kind: str) -> Callable[[Path], Tiny]:
    def write(folder: Path) -> Tiny:
        from support.tiny_families import controlnet_folder

        controlnet_folder(folder / "ControlNet", kind)
        return Tiny(folder / "ControlNet")

    return write


def _vae(kind: str) -> Callable[[Path], Tiny]:
    def write(folder: Path) -> Tiny:
        from support.tiny_families import kl_folder, vae_folder

        if kind == "kl":
            kl_folder(folder / "vae")
        else:
            vae_folder(folder / "vae", kind, levels=2)
        return Tiny(folder / "vae")

    return write


CHECKPOINTS: Mapping[str, Mapping[str, Callable[[Path], Tiny]]] = {
    "dit": {"published": _dit, "diffusers": _dit_diffusers},
    "uvit": {"published": _uvit},
    "ldm": {
        "original": _ldm,
        "token of context": _ldm_diffusers("attended"),
        "added to the time": _ldm_diffusers("added"),
    },
    "clip-text": {"transformers": _clip_text},
    "unet-sd": {"one level": _unet("one"), "pruned": _unet("bksdm"), "diffusers": _unet("sd")},
    "unet-sdxl": {
        "one level": _unet("xl-one"),
        "diffusers": _unet("sdxl"),
        "pruned and controlled": _unet("ssd1b", controlled=True),
    },
    "controlnet": {
        "one level": _controlnet("one"),
        "Stable Diffusion's": _controlnet("sd"),
        "SDXL's": _controlnet("sdxl"),
    },
    "vae-decoder": {"kl": _vae("kl"), "tiny": _vae("tiny"), "vq": _vae("vq")},
    "vae-encoder": {"kl": _vae("kl"), "tiny": _vae("tiny")},
}
