"""Families ``vae-decoder`` and ``vae-encoder``: the halves of the autoencoders that latents live in.

AutoencoderKL (Stable Diffusion, SDXL), AutoencoderTiny (TAESD) and VQModel (latent diffusion) from diffusers folders,
KL and VQ also from the original single files. The scaling of the diffusion model's latent is part of the graph. Both
are float32 by default: SDXL's KL leaves the range of float16 on real latents (``force_upcast`` in its config), but not
on random ones, so the check of an export can't tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_engines.needs import require
from tstitch_engines.spec import TensorSpec
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.config_limits import LARGEST_PICTURE, check_numbers
from tstitch_export.checkpoint.folder import files_of, model_folder, read_json, weights_file
from tstitch_export.families.base import TORCH_NAMES, Dim, Family, Inspection, Role, Scalar
from tstitch_export.families.options import typed
from tstitch_export.families.vae.layout import PREFIX, config_from_shapes, diffusers_names, diffusers_tensor, modern

if TYPE_CHECKING:
    from torch import nn

__all__ = ["VaeDecoderFamily", "VaeEncoderFamily"]

_KINDS: Final = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny", "VQModel": "vq"}
_FOLDERS: Final = ("vae", "vqvae")
# diffusers' own defaults, for what a config.json leaves out
_SCALING: Final = {"kl": 0.18215, "tiny": 1.0, "vq": 0.18215}
_CHANNELS: Final = {"kl": 4, "tiny": 4, "vq": 3}


class _VaeFamily(Family):
    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "scaling": (float, "latents of the diffusion model over the autoencoder's, if the checkpoint's is wrong"),
        "shift": (float, "what is added to the autoencoder's latent when decoding, if the checkpoint's is wrong"),
    }

    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        options = typed(options, self.options, what=f"family {self.name!r}")
        files: tuple[Path, ...]
        if path.is_file():
            layout, folder, files, config = "single-file", path, files_of(path), _file_config(path)
        else:
            folder, config = _read_folder(path)
            weights = weights_file(folder, ("diffusion_pytorch_model",))
            shapes, file = read_checkpoint(weights).shapes, folder / "config.json"
            check_numbers(config, shapes, str(file), largest_size=LARGEST_PICTURE)
            files = (file, *files_of(weights))
            layout = "diffusers"
        kind = _KINDS[config["_class_name"]]
        stated = config.get("scaling_factor")
        scaling = float(options.get("scaling", _SCALING[kind] if stated is None else stated))
        shift = float(options.get("shift", config.get("shift_factor") or 0.0))
        if not 1e-6 < scaling < 1e6:
            raise BadInput(f"scaling is {scaling}; allowed is above 0", hint="0.18215 for SD 1.x, 0.13025 for SDXL")
        factor = _factor(kind, config)
        channels = int(config.get("latent_channels") or _CHANNELS[kind])
        sample = config.get("sample_size") or (512 if kind == "tiny" else 256)
        native = max(1, int(min(sample) if isinstance(sample, (list, tuple)) else sample) // factor)
        return Inspection(
            family=self.name,
            layout=layout,
            path=folder,
            files=files,
            config={
                "kind": kind,
                "factor": factor,
                "scaling": scaling,
                "shift": shift,
                "channels": channels,
                "native": native,
                "force_upcast": bool(config.get("force_upcast", kind == "kl")),
            },
            latent=(channels, native, native),
            scaling=scaling,
            shift=shift,
            packages=("diffusers",),
        )

    def holds(self, shapes: Mapping[str, tuple[int, ...]], part: str) -> bool:
        return any(name.startswith(PREFIX) for name in shapes)

    def load(self, inspection: Inspection) -> nn.Module:
        model, config = _load(inspection), inspection.config
        from tstitch_export.families.vae.modules import Decode, Encode

        half = Decode if self.role == "vae_decoder" else Encode
        made = half(model, kind=str(config["kind"]), scaling=float(config["scaling"]), shift=float(config["shift"]))
        return made.eval().requires_grad_(False)

    def dims(self, inspection: Inspection) -> Mapping[str, Dim]:
        native = int(inspection.config["native"])
        return {"H": Dim(native=native), "W": Dim(native=native)}


class VaeDecoderFamily(_VaeFamily):
    """latent ``[B,C,H,W]`` -> image float32 ``[B,3,f*H,f*W]``, about [-1, 1] (not clamped)."""

    name = "vae-decoder"
    role: ClassVar[Role] = "vae_decoder"

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        shape = ("B", inspection.latent[0], "H", "W")
        return (TensorSpec(name="latent", dtype=TORCH_NAMES[precision], shape=shape),)

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name="image", dtype="float32", shape=("B", 3, *_pixels(inspection))),)


class VaeEncoderFamily(_VaeFamily):
    """image ``[B,3,f*H,f*W]`` in [-1, 1] -> mean, std float32 ``[B,C,H,W]``."""

    name = "vae-encoder"
    role: ClassVar[Role] = "vae_encoder"

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name="image", dtype=TORCH_NAMES[precision], shape=("B", 3, *_pixels(inspection))),)

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        shape = ("B", inspection.latent[0], "H", "W")
        return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name in ("mean", "std"))


def _pixels(inspection: Inspection) -> tuple[str, str]:
    factor = inspection.config["factor"]
    return (f"{factor}*H", f"{factor}*W") if factor != 1 else ("H", "W")


def _factor(kind: str, config: Mapping[str, Any]) -> int:
    key, default = ("encoder_block_out_channels", (64,) * 4) if kind == "tiny" else ("block_out_channels", (64,))
    return int(2 ** (len(config.get(key) or default) - 1))


def _read_folder(path: Path) -> tuple[Path, dict[str, Any]]:
    hint = f"give the vae folder of a pipeline; known are {', '.join(_KINDS)}"
    folder, config = model_folder(path, _FOLDERS, _KINDS, what="is no autoencoder", hint=hint)
    for key, allowed in (("latents_mean", None), ("latents_std", None), ("norm_type", "group"), ("out_channels", 3)):
        value = config.get(key, allowed)
        if value != allowed:
            raise BadCheckpoint(
                f"{folder}: {key} is {value!r}; allowed is {'none' if allowed is None else allowed}",
                hint="this autoencoder is not supported; build without it and decode the latents elsewhere",
            )
    return folder, config


def _file_config(path: Path) -> dict[str, Any]:
    shapes = read_checkpoint(path).shapes
    prefix = _prefix(shapes)
    if f"{prefix}encoder.down.0.block.0.conv1.weight" not in shapes:
        raise BadCheckpoint(
            f"{path.name} is no autoencoder: it has no {PREFIX}encoder.down.0.block.0.conv1.weight",
            hint="give the vae folder of a diffusers pipeline, or a single file in the original layout",
        )
    return config_from_shapes(shapes, prefix, what=path.name)


def _prefix(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return PREFIX if any(name.startswith(PREFIX) for name in shapes) else ""


def _load(inspection: Inspection) -> Any:
    diffusers = require("diffusers", f"the autoencoder {inspection.path.name}")
    from tstitch_export.families.assemble import assemble

    weights = inspection.files[-1]
    checkpoint = read_checkpoint(weights)
    stored = checkpoint.tensors()
    if inspection.layout == "diffusers":
        config = read_json(inspection.files[0]) or {}
        state = {modern(name): tensor for name, tensor in stored.items()}
    else:
        prefix = _prefix(checkpoint.shapes)
        config = config_from_shapes(checkpoint.shapes, prefix, what=weights.name)
        names = diffusers_names(checkpoint.shapes, prefix)
        state = {name: diffusers_tensor(name, stored[source]) for name, source in names.items()}
    return assemble(getattr(diffusers, config["_class_name"]), config, state, name=weights.name)
