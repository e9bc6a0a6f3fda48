"""Families ``unet-sd`` and ``unet-sdxl``: text-conditioned diffusers UNets with the member signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.needs import require
from tstitch_engines.spec import TensorSpec
from tstitch_export.checkpoint.conventions import CONVENTION_OPTIONS, read_options
from tstitch_export.checkpoint.signatures import Shapes
from tstitch_export.families.base import TORCH_NAMES, Dim, Family, Inspection, LoraTarget, Scalar
from tstitch_export.families.lora.fuse import LORA_OPTION, check_loras, describe_loras, fuse, parse_loras
from tstitch_export.families.unet.config import CLASS, UNetConfig, published_name
from tstitch_export.families.unet.layout import module_names
from tstitch_export.families.unet.source import Source, read_state, read_unet
from tstitch_export.families.unet.text import text_inputs

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "SdxlFamily",
    "StableDiffusionFamily",
    "TextConditioned",
    "UNetInspection",
    "config_of",
    "described",
    "residual_specs",
]

TOKENS = 77  # of a prompt, as CLIP encodes it


@dataclass(frozen=True, kw_only=True)
class UNetInspection(Inspection):
    """A UNet or a ControlNet. ``unet`` is its diffusers configuration; ``weights`` are among ``files``."""

    unet: UNetConfig
    weights: tuple[Path, ...]


class TextConditioned(Family):
    """What UNets and ControlNets share: sample ``[B,C,H,W]``, timestep ``[B]`` and the tensors of a prompt."""

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        text, dtype = inspection.text, TORCH_NAMES[precision]
        assert text is not None
        specs = [
            TensorSpec(name="sample", dtype=dtype, shape=("B", inspection.latent[0], "H", "W")),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="encoder_hidden_states", dtype=dtype, shape=("B", "T", text.width)),
        ]
        if text.pooled is not None:
            specs.append(TensorSpec(name="text_embeds", dtype=dtype, shape=("B", text.pooled_width)))
            numbers = 5 if text.time_ids == "aesthetic" else 6
            specs.append(TensorSpec(name="time_ids", dtype="float32", shape=("B", numbers)))
        return tuple(specs)

    def dims(self, inspection: Inspection) -> Mapping[str, Dim]:
        (_, height, width), multiple = inspection.latent, config_of(inspection).multiple
        sides = {"H": Dim(native=height, multiple=multiple), "W": Dim(native=width, multiple=multiple)}
        return {**sides, "T": Dim(native=TOKENS)}


class _UNetFamily(TextConditioned):
    """sample ``[B,C,H,W]``, timestep ``[B]``, ``encoder_hidden_states [B,T,D]`` and what else the UNet has."""

    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "lora": LORA_OPTION,
        "controlled": (bool, "take the residuals of a ControlNet (the bundle needs the part controlnet)"),
        **CONVENTION_OPTIONS,
    }

    choices: ClassVar[frozenset[str]] = frozenset({"lora", "controlled"})

    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> UNetInspection:
        said = read_options(options)
        source = read_unet(path, said)
        config = UNetConfig(source.config)
        self._expect_kind(path, config)
        channels, learned, inpaints = _channels(path, config)
        loras = parse_loras(str(options.get("lora") or ""))
        check_loras(loras, _lora_target(source.shapes, config), model=path.name)
        trained = source.conventions(said)
        height, width = source.native(trained)
        name = published_name(config)
        facts = source.facts
        controlled = bool(options.get("controlled"))
        extra: dict[str, Scalar] = {"controlled": True} if controlled else {}
        if loras:
            extra["lora"] = describe_loras(loras)
        return UNetInspection(
            family=self.name,
            layout=source.layout,
            path=source.path,
            files=(*source.described, *(use.path for use in loras), *source.weights),
            config={
                **described(source, config, f"{name or 'UNet'}{', inpainting' if inpaints else ''}"),
                "transformer_layers": ",".join(map(str, config.depths)),
                "size": f"{height}x{width}",
                **extra,
            },
            latent=(channels, height, width),
            learned_variance=learned,
            trained=trained,
            scaling=facts.scaling,
            shift=facts.shift,
            scheduler=facts.scheduler_of(trained),
            text=text_inputs(source, config),
            guidance_embedding=int(config["time_cond_proj_dim"] or 0),
            controlled=controlled,
            inpaints=inpaints,
            packages=("diffusers",),
            unet=config,
            weights=source.weights,
            loras=loras,
            notes=source.notes,
        )

    def load(self, inspection: Inspection) -> nn.Module:
        assert isinstance(inspection, UNetInspection)
        require("torch", "exporting a UNet")
        diffusers = require("diffusers", f"the UNet {inspection.path.name}")
        from tstitch_export.families.assemble import assemble
        from tstitch_export.families.unet.model import UNetMember

        state = read_state(inspection.layout, inspection.weights, inspection.unet.raw)
        name = inspection.path.name
        if inspection.loras:
            fuse(state, inspection.loras, self.lora_target(inspection), model=name)
        unet = assemble(getattr(diffusers, CLASS), inspection.unet.raw, state, name=name)
        return UNetMember(unet, [spec.name for spec in self.inputs(inspection, "fp32")[2:]]).eval()

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        dtype, channels = TORCH_NAMES[precision], inspection.latent[0]
        specs = [*super().inputs(inspection, precision)]
        if inspection.guidance_embedding:
            specs.append(TensorSpec(name="timestep_cond", dtype=dtype, shape=("B", inspection.guidance_embedding)))
        if inspection.inpaints:
            specs.append(TensorSpec(name="inpaint", dtype=dtype, shape=("B", 1 + channels, "H", "W")))
        if inspection.controlled:
            specs += residual_specs(config_of(inspection), precision)
        return tuple(specs)

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        channels = inspection.latent[0] * (2 if inspection.learned_variance else 1)
        return (TensorSpec(name="model_output", dtype=TORCH_NAMES[precision], shape=("B", channels, "H", "W")),)

    def lora_target(self, inspection: Inspection) -> LoraTarget:
        return _lora_target(read_unet(inspection.path).shapes, config_of(inspection))

    def _expect_kind(self, path: Path, config: UNetConfig) -> None:
        if self.name == f"unet-{config.kind}":
            return
        if config.unknown is not None:
            what = f"a UNet with conditioning that neither unet-sd nor unet-sdxl has ({config.unknown})"
            hint = "give a UNet of Stable Diffusion, SDXL or one of their relatives"
        else:
            other = published_name(config) or f"a UNet of the family unet-{config.kind}"
            what, hint = other, f'use a recipe whose member has family = "unet-{config.kind}"'
        raise BadCheckpoint(f"{path} is no model of the family {self.name}: it looks like {what}", hint=hint)


class StableDiffusionFamily(_UNetFamily):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752) and every UNet that a prompt's hidden states alone condition.

    BK-SDM (arXiv 2305.15798), inpainting with 9 channels, LCM with an embedded guidance scale (arXiv 2310.04378).
    """

    name = "unet-sd"


class SdxlFamily(_UNetFamily):
    """SDXL and its refiner (arXiv 2307.01952), SSD-1B and Vega (arXiv 2401.02677)."""

    name = "unet-sdxl"


def config_of(inspection: Inspection) -> UNetConfig:
    assert isinstance(inspection, UNetInspection)
    return inspection.unet


def residual_specs(config: UNetConfig, precision: Precision) -> list[TensorSpec]:
    """What a ControlNet gives and a controlled member takes: ``down_residual_0...`` and ``mid_residual``."""
    *down, middle = config.residuals
    named = [*((f"down_residual_{index}", part) for index, part in enumerate(down)), ("mid_residual", middle)]
    return [
        TensorSpec(name=name, dtype=TORCH_NAMES[precision], shape=("B", channels, _part("H", by), _part("W", by)))
        for name, (channels, by) in named
    ]


def described(source: Source, config: UNetConfig, model: str) -> dict[str, Scalar]:
    """What a manifest says of a UNet or ControlNet.

    ``residuals`` are one word each: ``320 320 320/2 640/2 ...``, channels and part of the latent's sides.
    """
    return {
        "model": model,
        "parameters": source.parameters,
        "channels": ",".join(map(str, config.channels)),
        "layers": ",".join(map(str, config.layers)),
        "text_width": config.width or 0,
        "multiple": config.multiple,
        "residuals": " ".join(str(channels) if by == 1 else f"{channels}/{by}" for channels, by in config.residuals),
    }


def _part(name: str, by: int) -> str:
    return name if by == 1 else f"{name}/{by}"


def _channels(path: Path, config: UNetConfig) -> tuple[int, bool, bool]:
    """Channels of the latent, whether a variance comes with the output, whether it takes mask and masked latent."""
    taken, given = int(config["in_channels"]), int(config["out_channels"])
    if given in (taken, 2 * taken):
        return taken, given != taken, False
    if taken == 2 * given + 1:
        return given, False, True
    raise BadCheckpoint(
        f"{path} takes {taken} channels and gives {given}; known are C to C or 2 C (learned variance), and 2 C + 1 to "
        "C (inpainting: the mask and the masked latent beside the latent)",
        hint="models that are conditioned on a picture (InstructPix2Pix, depth, upscalers) can't be built",
    )


def _lora_target(shapes: Shapes, config: UNetConfig) -> LoraTarget:
    """The aliases are the modules' original names, as LoRAs for SDXL spell them."""
    originals = module_names(config)
    found = {}
    for key in shapes:
        if not key.endswith(".weight"):
            continue
        module = key[: -len(".weight")]
        parts = module.split(".")
        for cut in range(len(parts), 0, -1):
            if (original := originals.get(".".join(parts[:cut]))) is not None:
                found[".".join((original, *parts[cut:]))] = module
                break
    return LoraTarget(shapes=shapes, aliases=found, prefix="unet.")
