"""Family ``uvit``: published class-conditional U-ViT state dicts (arXiv 2209.12152)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.needs import require
from tstitch_export.checkpoint.checkpoint import Checkpoint, read_checkpoint
from tstitch_export.checkpoint.conventions import (
    CONVENTION_OPTIONS,
    Conventions,
    Statement,
    conventions_of,
    read_options,
    say,
)
from tstitch_export.checkpoint.folder import files_of
from tstitch_export.checkpoint.statements import statements_of
from tstitch_export.families.base import Inspection, Scalar
from tstitch_export.families.class_member import ClassMember
from tstitch_export.families.options import typed
from tstitch_export.families.uvit.layout import NOISE, Time, config_from_shapes, published_name, time_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["UViTFamily"]


class UViTFamily(ClassMember):
    """sample ``[B,C,H,W]``, timestep ``[B]`` float32, labels ``[B]`` int64 -> model_output ``[B,C,H,W]``.

    The published models were trained with two kinds of noise, which the checkpoint does not say: it follows from the
    size, or is stated with ``time``. The timesteps are those of that noise schedule; what the network itself is told
    is computed in the graph.
    """

    name = "uvit"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "num_heads": (int, "attention heads, if the width does not determine them"),
        "null_class": (bool, "whether the last row of the label table is the null class; by default it is"),
        "time": (str, "discrete or continuous: the noise it was trained with, if its size does not say"),
        "prediction": CONVENTION_OPTIONS["prediction"],
    }

    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        given = typed(options, self.options, what="family 'uvit'")
        if path.is_dir():
            raise BadCheckpoint(
                f"{path} is a folder; a U-ViT is published as one file", hint="give its nnet_ema.pth, or a .safetensors"
            )
        checkpoint = read_checkpoint(path)
        heads, time = given.get("num_heads"), given.get("time")
        config = config_from_shapes(checkpoint.shapes, name=path.name, heads=None if heads is None else int(heads))
        convention = time_of(None if time is None else str(time), config, path.name)
        said = read_options(given)
        if time is not None:  # which says the noise
            said = replace(said, noise=NOISE[convention], zero_snr=False)
        trained = _trained(checkpoint, said, convention)
        return Inspection(
            family=self.name,
            layout="published",
            path=path,
            files=files_of(path),
            config={
                "model": published_name(config.depth, config.width, config.patch),
                **asdict(config),
                "time": convention,
            },
            latent=(config.channels, config.size, config.size),
            labels=config.labels,
            null_class=bool(given.get("null_class", True)),
            trained=trained,
        )

    def load(self, inspection: Inspection) -> nn.Module:
        require("torch", "exporting a U-ViT")
        from tstitch_export.families.assemble import fill
        from tstitch_export.families.uvit.model import UViT

        checkpoint, name = read_checkpoint(inspection.path), inspection.path.name
        config = config_from_shapes(checkpoint.shapes, name=name, heads=int(inspection.config["heads"]))
        time = time_of(str(inspection.config["time"]), config, name)
        return fill(lambda: UViT(config, time), checkpoint.tensors(), name=name)


def _trained(checkpoint: Checkpoint, said: Conventions, time: Time) -> Conventions:
    """Raises ``BadCheckpoint`` where the file contradicts the noise of ``time``, unless that was ``said``."""
    own = Statement(source=f"its time ({time})", noise=NOISE[time], zero_snr=False)
    try:
        stated, notes = statements_of(checkpoint, said)
        return conventions_of(checkpoint.path.name, [*stated, own], said=said, notes=notes)
    except BadCheckpoint as error:
        if not any(f"MEMBER.{option}=" in error.hint for option in ("noise", "zero_snr")):
            raise
        other = "discrete" if time == "continuous" else "continuous"
        raise BadCheckpoint(
            error.message, hint=f"{say('time', other)}; or {time}, which it is taken for, if its noise is as published"
        ) from None
