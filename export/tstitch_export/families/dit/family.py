"""Family ``dit``: published DiT state dicts and diffusers ``DiTTransformer2DModel`` folders (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tstitch_engines.needs import require
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.conventions import CONVENTION_OPTIONS, conventions_of, read_options
from tstitch_export.checkpoint.folder import files_of
from tstitch_export.checkpoint.statements import statements_of
from tstitch_export.families.base import Inspection, Scalar
from tstitch_export.families.class_member import ClassMember
from tstitch_export.families.dit import diffusers as dit_diffusers
from tstitch_export.families.dit.layout import config_from_shapes, published_name
from tstitch_export.families.dit.training import check_training, has_null_class
from tstitch_export.families.options import typed

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DiTFamily"]


class DiTFamily(ClassMember):
    name = "dit"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "num_heads": (int, "attention heads, if neither the width nor config.json says"),
        "null_class": (bool, "whether the last row of the label table is the null class; by default it is"),
        **CONVENTION_OPTIONS,
    }

    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        given = typed(options, self.options, what="family 'dit'")
        heads, said = None if "num_heads" not in given else int(given["num_heads"]), read_options(given)
        if path.is_dir():
            null_class = bool(given.get("null_class", True))
            return replace(dit_diffusers.inspect(path, heads, said), null_class=null_class)
        checkpoint = read_checkpoint(path)
        config = config_from_shapes(checkpoint.shapes, name=path.name, heads=heads)
        stated, notes = statements_of(checkpoint, said)
        notes += check_training(checkpoint, config, said)
        stated_null = given.get("null_class", has_null_class(checkpoint, config))
        return Inspection(
            family=self.name,
            layout="published",
            path=path,
            files=files_of(path),
            config={
                "model": published_name(config.depth, config.width, config.patch),
                **{name: value for name, value in asdict(config).items() if name not in ("classes", "null_class")},
                "labels": config.classes + 1,
            },
            latent=(config.channels, config.size, config.size),
            labels=config.classes + 1,
            null_class=stated_null is None or bool(stated_null),
            learned_variance=config.learn_sigma,
            trained=replace(
                conventions_of(path.name, stated, said=said, notes=notes),
                doubt=None if config.learn_sigma else "has no learned variance, as the published DiTs have",
            ),
        )

    def load(self, inspection: Inspection) -> nn.Module:
        require("torch", "exporting a DiT")
        if inspection.layout == "diffusers":
            return dit_diffusers.load(inspection)
        from tstitch_export.families.assemble import fill
        from tstitch_export.families.dit.model import DiT

        checkpoint, name = read_checkpoint(inspection.path), inspection.path.name
        config = config_from_shapes(checkpoint.shapes, name=name, heads=int(inspection.config["heads"]))
        return fill(lambda: DiT(config), checkpoint.tensors(), name=name)
