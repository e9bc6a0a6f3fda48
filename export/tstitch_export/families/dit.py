"""Family ``dit``: published DiT state dicts and diffusers ``DiTTransformer2DModel`` folders (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tstitch_engines.errors import BadCheckpoint, BadInput, unknown_name
from tstitch_engines.manifest import Precision
from tstitch_engines.spec import TensorSpec
from tstitch_export.checkpoint import read_checkpoint
from tstitch_export.families import dit_diffusers
from tstitch_export.families.base import TORCH_NAMES, Family, Inspection, Scalar
from tstitch_export.families.dit_config import DiTConfig
from tstitch_export.families.dit_layout import config_from_shapes, published_name
from tstitch_export.needs import need_torch

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DiTFamily"]


class DiTFamily(Family):
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

        from tstitch_export.families.dit_model import DiT

        stored = read_checkpoint(inspection.path).tensors()
        if bad := next((name for name, tensor in stored.items() if not torch.isfinite(tensor).all()), None):
            raise BadCheckpoint(
                f"{inspection.path.name}: {bad} holds NaN or infinity", hint="take a checkpoint from before that"
            )
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
        model.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, assign=True)
        return model.eval().requires_grad_(False)

    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec(name="sample", dtype=TORCH_NAMES[precision], shape=("B", *inspection.latent)),
            TensorSpec(name="timestep", dtype="float32", shape=("B",)),
            TensorSpec(name="labels", dtype="int64", shape=("B",)),
        )

    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]:
        channels, height, width = inspection.latent
        shape = ("B", channels * (2 if inspection.learned_variance else 1), height, width)
        return (TensorSpec(name="model_output", dtype=TORCH_NAMES[precision], shape=shape),)

    def example(
        self, inspection: Inspection, *, batch: int, seed: int, sizes: Mapping[str, int] | None = None
    ) -> tuple[Tensor, ...]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(batch, *inspection.latent, generator=generator),
            torch.rand(batch, generator=generator) * 999,
            torch.randint(0, inspection.labels, (batch,), generator=generator),
        )


def _heads(options: Mapping[str, Scalar]) -> int | None:
    for name in options:
        if name not in DiTFamily.options:
            raise unknown_name("option of family 'dit'", name, DiTFamily.options)
    heads = options.get("num_heads")
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int)):
        raise BadInput(f"num_heads is {heads!r}; allowed is a whole number", hint="e.g. --option large.num_heads=16")
    return heads
