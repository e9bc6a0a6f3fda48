"""What ``unet-sd`` and ``unet-sdxl`` share: a diffusers UNet that text conditions, with the member signature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from tstitch_engines.bundle.manifest import Precision, TextInputs
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.spec import TensorSpec
from tstitch_export.families.base import TORCH_NAMES, Dim, Family, Inspection, LoraTarget, Scalar
from tstitch_export.families.lora.fuse import LORA_OPTION, check_loras, describe_loras, fuse, parse_loras
from tstitch_export.families.unet.config import CLASS, Kind, UNetConfig, published_name
from tstitch_export.families.unet.layout import module_names
from tstitch_export.families.unet.source import Source, read_state, read_unet
from tstitch_export.needs import need_torch, require

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "TOKENS",
    "UNetFamily",
    "UNetInspection",
    "latent_dims",
    "random_inputs",
    "residual_specs",
    "residual_text",
    "text_specs",
]

TOKENS = 77  # of a prompt, as CLIP encodes it


@dataclass(frozen=True, kw_only=True)
class UNetInspection(Inspection):
    """``unet`` is what diffusers' ``from_config`` takes; ``weights`` are among ``files``."""

    unet: Mapping[str, Any]
    weights: tuple[Path, ...]


class UNetFamily(Family):
    """sample ``[B,C,H,W]``, timestep ``[B]``, ``encoder_hidden_states [B,T,D]`` and what else the UNet has."""

    kind: ClassVar[Kind]
    options: Mapping[str, tuple[type, str]] = MappingProxyType(
        {
            "lora": LORA_OPTION,
            "controlled": (bool, "take the residuals of a ControlNet (the bundle needs the part controlnet)"),
        }
    )

    choices: ClassVar[frozenset[str]] = frozenset({"lora", "controlled"})

    @abstractmethod
    def text(self, source: Source, config: UNetConfig) -> TextInputs:
        """How a prompt reaches it. Raises ``BadCheckpoint``."""

    @abstractmethod
    def native(self) -> int:
        """The latent's usual side where the checkpoint does not state it."""

    def inspect(self, path: Path, options: Mapping[str, Scalar]) -> UNetInspection:
        source = read_unet(path)
        config = UNetConfig(source.config)
        self._expect_kind(path, config)
        channels, learned, inpaints = _channels(path, config)
        loras = parse_loras(str(options.get("lora") or ""))
        check_loras(loras, source.shapes, model=path.name, aliases=_aliases(source.shapes, config))
        height, width = config.native or (self.native(), self.native())
        name = published_name(config)
        facts = source.facts
        controlled = bool(options.get("controlled"))
        described: dict[str, Scalar] = {
            "model": f"{name or 'UNet'}{', inpainting' if inpaints else ''}",
            "parameters": source.parameters,
            "channels": ",".join(map(str, config.channels)),
            "layers": ",".join(map(str, config.layers)),
            "transformer_layers": ",".join(map(str, config.depths)),
            "text_width": config.width or 0,
            "size": f"{height}x{width}",
            "multiple": config.multiple,
            "residuals": residual_text(config),
        }
        if controlled:
            described["controlled"] = True
        if loras:
            described["lora"] = describe_loras(loras)
        return UNetInspection(
            family=self.name,
            layout=source.layout,
            path=source.path,
            files=(*source.described, *(use.path for use in loras), *source.weights),
            config=described,
            latent=(channels, height, width),
            learned_variance=learned,
            noise=facts.noise,
            parametrisation=facts.parametrisation,
            scaling=facts.scaling,
            shift=facts.shift,
            scheduler=facts.scheduler,
            text=self.text(source, config),
            guidance_embedding=int(config["time_cond_proj_dim"] or 0),
            controlled=controlled,
            inpaints=inpaints,
            packages=("diffusers",),
            unet=source.config,
            weights=source.weights,
            loras=loras,
        )

    def load(self, inspection: Inspection) -> nn.Module:
        assert isinstance(inspection, UNetInspection)
        need_torch("exporting a UNet")
        diffusers = require("diffusers", f"the UNet {inspection.path.name}")
        from tstitch_export.families.unet.model import UNetMember, assemble

        state = read_state(inspection.layout, inspection.weights, inspection.unet)
        name = inspection.path.name
        if inspection.loras:
            shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
            fuse(state, inspection.loras, model=name, aliases=_aliases(shapes, UNetConfig(inspection.unet)))
        unet = assemble(getattr(diffusers, CLASS), inspection.unet, state, name=name)
        return UNetMember(unet, [spec.name for spec in self.inputs(inspection, "fp32")[2:]]).eval()

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        assert isinstance(inspection, UNetInspection)
        dtype = TORCH_NAMES[precision]
        channels = inspection.latent[0]
        specs = [
            TensorSpec(name="sample", dtype=dtype, shape=("B", channels, "H", "W")),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            *text_specs(inspection, precision),
        ]
        if inspection.guidance_embedding:
            specs.append(TensorSpec(name="timestep_cond", dtype=dtype, shape=("B", inspection.guidance_embedding)))
        if inspection.inpaints:
            specs.append(TensorSpec(name="inpaint", dtype=dtype, shape=("B", 1 + channels, "H", "W")))
        if inspection.controlled:
            specs += residual_specs(UNetConfig(inspection.unet), precision)
        return tuple(specs)

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        channels = inspection.latent[0] * (2 if inspection.learned_variance else 1)
        return (TensorSpec(name="model_output", dtype=TORCH_NAMES[precision], shape=("B", channels, "H", "W")),)

    def dims(self, inspection: Inspection) -> Mapping[str, Dim]:
        assert isinstance(inspection, UNetInspection)
        return latent_dims(inspection, UNetConfig(inspection.unet).multiple)

    def example(
        self, inspection: Inspection, *, batch: int, seed: int, sizes: Mapping[str, int] | None = None
    ) -> tuple[Tensor, ...]:
        found = sizes or {name: dim.native for name, dim in self.dims(inspection).items()}
        return random_inputs(self.inputs(inspection, "fp32"), {**found, "B": batch}, seed)

    def lora_target(self, inspection: Inspection) -> LoraTarget:
        assert isinstance(inspection, UNetInspection)
        shapes = read_unet(inspection.path).shapes
        aliases = _aliases(shapes, UNetConfig(inspection.unet))
        return LoraTarget(part="unet", shapes=shapes, aliases=aliases, prefix="unet.")

    def _expect_kind(self, path: Path, config: UNetConfig) -> None:
        if config.kind == self.kind:
            return
        if config.unknown is not None:
            what = f"a UNet with conditioning that neither unet-sd nor unet-sdxl has ({config.unknown})"
            hint = "give a UNet of Stable Diffusion, SDXL or one of their relatives"
        else:
            other = published_name(config) or f"a UNet of the family unet-{config.kind}"
            what, hint = other, f'use a recipe whose member has family = "unet-{config.kind}"'
        raise BadCheckpoint(f"{path} is no model of the family {self.name}: it looks like {what}", hint=hint)


def text_specs(inspection: Inspection, precision: Precision) -> list[TensorSpec]:
    """The tensors that a prompt becomes, in the members' order."""
    text = inspection.text
    assert text is not None
    dtype = TORCH_NAMES[precision]
    specs = [TensorSpec(name="encoder_hidden_states", dtype=dtype, shape=("B", "T", text.width))]
    if text.pooled is not None:
        specs.append(TensorSpec(name="text_embeds", dtype=dtype, shape=("B", text.pooled_width)))
        numbers = 5 if text.time_ids == "aesthetic" else 6
        specs.append(TensorSpec(name="time_ids", dtype="float32", shape=("B", numbers)))
    return specs


def residual_specs(config: UNetConfig, precision: Precision) -> list[TensorSpec]:
    """What a ControlNet gives and a controlled member takes: ``down_residual_0...`` and ``mid_residual``."""
    *down, middle = config.residuals
    named = [*((f"down_residual_{index}", part) for index, part in enumerate(down)), ("mid_residual", middle)]
    return [
        TensorSpec(name=name, dtype=TORCH_NAMES[precision], shape=("B", channels, _part("H", by), _part("W", by)))
        for name, (channels, by) in named
    ]


def residual_text(config: UNetConfig) -> str:
    """The residuals as one word each: ``320 320 320/2 640/2 ...``, channels and part of the latent's sides."""
    return " ".join(str(channels) if by == 1 else f"{channels}/{by}" for channels, by in config.residuals)


def latent_dims(inspection: Inspection, multiple: int) -> dict[str, Dim]:
    _, height, width = inspection.latent
    return {
        "H": Dim(native=height, multiple=multiple),
        "W": Dim(native=width, multiple=multiple),
        "T": Dim(native=TOKENS),
    }


def random_inputs(specs: tuple[TensorSpec, ...], sizes: Mapping[str, int], seed: int) -> tuple[Tensor, ...]:
    """Random inputs by name, in float32, as sampling could give them."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def tensor(spec: TensorSpec) -> Tensor:
        shape = spec.resolve(sizes)
        if spec.name == "timestep":
            return torch.rand(shape, generator=generator) * 999
        if spec.name == "time_ids":  # heights, widths and a score
            return torch.randint(0, 1024, shape, generator=generator).float()
        if spec.name in ("control", "control_scale"):
            return torch.rand(shape, generator=generator)
        normal = torch.randn(shape, generator=generator)
        if spec.name == "inpaint":
            normal[:, :1] = (normal[:, :1] > 0).float()
        return normal

    return tuple(tensor(spec) for spec in specs)


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


def _aliases(shapes: Mapping[str, tuple[int, ...]], config: UNetConfig) -> dict[str, str]:
    """The modules under their original names, as LoRAs for SDXL spell them."""
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
    return found
