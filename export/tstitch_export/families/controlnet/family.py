"""Family ``controlnet``: ControlNets (arXiv 2302.05543) for Stable Diffusion and SDXL, in folders or single files.

Its residuals have the names of the members' inputs and are already multiplied by ``control_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.needs import require
from tstitch_engines.spec import TensorSpec
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.folder import files_of
from tstitch_export.families.base import TORCH_NAMES, Inspection, Role, Scalar
from tstitch_export.families.controlnet.layout import control_config, control_names
from tstitch_export.families.unet.config import UNetConfig
from tstitch_export.families.unet.family import TextConditioned, UNetInspection, config_of, described, residual_specs
from tstitch_export.families.unet.source import Source, read_diffusers
from tstitch_export.families.unet.text import text_inputs

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ControlNetFamily", "residuals_fit"]

_CLASS: Final = "ControlNetModel"
_SINGLE: Final = "single-file"


class ControlNetFamily(TextConditioned):
    """The members' ``sample``, ``timestep`` and text, ``control [B,3,8H,8W]`` in [0, 1], ``control_scale [B]``.

    Gives ``down_residual_0 ...`` and ``mid_residual``.
    """

    name = "controlnet"
    role: ClassVar[Role] = "controlnet"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {}

    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> UNetInspection:
        source = _single(path) if path.is_file() else read_diffusers(path, part="controlnet", kind=_CLASS)
        config = UNetConfig(source.config)
        problem = _problem(config)
        if problem is not None:
            raise BadCheckpoint(
                f"{path} is a ControlNet of an unknown kind: {problem}",
                hint="give one for Stable Diffusion or SDXL that takes an RGB picture and is not pooled",
            )
        return UNetInspection(
            family=self.name,
            layout=source.layout,
            path=source.path,
            files=(*source.described, *source.weights),
            config={
                **described(source, config, f"ControlNet for {'Stable Diffusion' if config.kind == 'sd' else 'SDXL'}"),
                "factor": _factor(config),
            },
            latent=(int(config["in_channels"]), *config.native),
            text=text_inputs(source, config),
            packages=("diffusers",),
            unet=config,
            weights=source.weights,
        )

    def load(self, inspection: Inspection) -> nn.Module:
        assert isinstance(inspection, UNetInspection)
        require("torch", "exporting a ControlNet")
        diffusers = require("diffusers", f"the ControlNet {inspection.path.name}")
        from tstitch_export.families.assemble import assemble
        from tstitch_export.families.unet.model import ControlNet

        name = inspection.path.name
        state = read_checkpoint(inspection.weights[-1]).tensors()
        if inspection.layout == _SINGLE:
            names = control_names(state, inspection.unet, name=name)
            state = {ours: state[key] for key, ours in names.items()}
        model = assemble(getattr(diffusers, _CLASS), inspection.unet.raw, state, name=name)
        return ControlNet(model, [spec.name for spec in self.inputs(inspection, "fp32")[2:]]).eval()

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        factor = _factor(config_of(inspection))
        shape = ("B", 3, f"{factor}*H", f"{factor}*W")
        return (
            *super().inputs(inspection, precision),
            TensorSpec(name="control", dtype=TORCH_NAMES[precision], shape=shape),
            TensorSpec(name="control_scale", dtype="float32", shape=("B",)),
        )

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        return tuple(residual_specs(config_of(inspection), precision))


def residuals_fit(member: Inspection, controlnet: Inspection) -> dict[str, str] | str:
    """The member's residual inputs -> the ControlNet's outputs that feed them; or the reason why they can't.

    Channels and resolutions must be equal one to one, as those of SSD-1B and Vega are with SDXL's (only transformer
    layers and the middle were pruned; the middle residual is added in its place, as diffusers does). BK-SDM has fewer
    blocks than Stable Diffusion.
    """
    if not member.controlled:
        return f"{member.path.name} was not exported to take residuals (option controlled)"
    taken, given = str(member.config["residuals"]).split(), str(controlnet.config["residuals"]).split()
    if taken != given:
        return (
            f"{member.path.name} takes {len(taken)} residuals ({' '.join(taken)}), {controlnet.path.name} gives "
            f"{len(given)} ({' '.join(given)}); channels and resolutions have to be the same one to one"
        )
    ours, theirs = member.text, controlnet.text
    assert ours is not None, "a controlled member has text"
    assert theirs is not None, "as every ControlNet"
    for what, left, right in (
        ("text of width", ours.width, theirs.width),
        ("a projection of width", ours.pooled_width, theirs.pooled_width),
        ("sizes of the kind", ours.time_ids, theirs.time_ids),
        ("latents with channels:", member.latent[0], controlnet.latent[0]),
    ):
        if left != right:
            return f"{member.path.name} takes {what} {left}, {controlnet.path.name} {right}"
    names = [*(f"down_residual_{index}" for index in range(len(taken) - 1)), "mid_residual"]
    return {name: name for name in names}


def _single(path: Path) -> Source:
    shapes = read_checkpoint(path).shapes
    config = control_config(shapes, name=path.name)
    return Source(
        layout=_SINGLE,
        path=path,
        described=(),
        weights=files_of(path),
        config=config.raw,
        shapes={ours: shapes[key] for key, ours in control_names(shapes, config, name=path.name).items()},
    )


def _problem(config: UNetConfig) -> str | None:
    if config.unknown is not None:
        return config.unknown
    colours = config.raw.get("conditioning_channels") or 3
    if colours != 3:
        return f"conditioning_channels = {colours}"
    return "global_pool_conditions = true" if config.raw.get("global_pool_conditions") else None


def _factor(config: UNetConfig) -> int:
    """Pixels of the control picture per latent element: its embedding halves the sides once per step."""
    steps = config.raw.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
    return int(2 ** (len(steps) - 1))
