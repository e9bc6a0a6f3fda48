"""Family ``dit``: published DiT state dicts and diffusers ``DiTTransformer2DModel`` folders (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.families.base import Inspection, Scalar
from tstitch_export.families.class_member import ClassMember, fill
from tstitch_export.families.dit import diffusers as dit_diffusers
from tstitch_export.families.dit.config import DiTConfig
from tstitch_export.families.dit.layout import config_from_shapes, published_name
from tstitch_export.needs import need_torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DiTFamily"]


class DiTFamily(ClassMember):
    """sample ``[B,C,H,W]``, timestep ``[B]`` float32, labels ``[B]`` int64 -> model_output ``[B,C or 2C,H,W]``."""

    name = "dit"
    options: Mapping[str, tuple[type, str]] = MappingProxyType(
        {"num_heads": (int, "attention heads, where width and config.json do not tell")}
    )

    def inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        heads = _heads(options)
        if path.is_dir():
            return dit_diffusers.inspect(path, heads)
        checkpoint = read_checkpoint(path)
        config = config_from_shapes(checkpoint.shapes, name=path.name, heads=heads)
        return Inspection(
            family=self.name,
            layout="published",
            path=path,
            files=(path,),
            config={
                "model": published_name(config.depth, config.width, config.patch),
                "depth": config.depth,
                "width": config.width,
                "heads": config.heads,
                "patch": config.patch,
                "size": config.size,
                "channels": config.channels,
                "labels": config.classes + 1,
                "learn_sigma": config.learn_sigma,
                "mlp_ratio": config.mlp_ratio,
            },
            latent=(config.channels, config.size, config.size),
            labels=config.classes + 1,
            learned_variance=config.learn_sigma,
        )

    def load(self, inspection: Inspection) -> nn.Module:
        need_torch("exporting a DiT")
        if inspection.layout == "diffusers":
            return dit_diffusers.load(inspection)
        import torch

        from tstitch_export.families.dit.model import DiT

        config = inspection.config
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = DiT(
                DiTConfig(
                    depth=int(config["depth"]),
                    width=int(config["width"]),
                    heads=int(config["heads"]),
                    patch=int(config["patch"]),
                    size=int(config["size"]),
                    channels=int(config["channels"]),
                    classes=int(config["labels"]) - 1,
                    learn_sigma=bool(config["learn_sigma"]),
                    mlp_ratio=float(config["mlp_ratio"]),
                )
            )
        return fill(model, read_checkpoint(inspection.path).tensors(), inspection.path.name)


def _heads(options: Mapping[str, Scalar]) -> int | None:
    for name in options:
        if name not in DiTFamily.options:
            raise unknown_name("option of family 'dit'", name, DiTFamily.options)
    heads = options.get("num_heads")
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int)):
        raise BadInput(f"num_heads is {heads!r}; allowed is a whole number", hint="e.g. --option large.num_heads=16")
    return heads
