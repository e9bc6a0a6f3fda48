"""Family ``ldm``: class-conditional latent diffusion UNets (arXiv 2112.10752), each with its own class embedder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from tstitch_engines.errors import BadCheckpoint, BadInput, unknown_name
from tstitch_engines.needs import require
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.conventions import CONVENTION_OPTIONS, Conventions, conventions_of, read_options
from tstitch_export.checkpoint.folder import files_of
from tstitch_export.checkpoint.statements import statements_of
from tstitch_export.families.base import Dim, Inspection, Scalar
from tstitch_export.families.class_member import ClassMember
from tstitch_export.families.ldm import diffusers as ldm_diffusers
from tstitch_export.families.ldm.layout import (
    EMA,
    TABLE,
    Heads,
    config_from_shapes,
    diffusers_config,
    ema_name,
    expected_shapes,
    native_size,
    published_name,
)
from tstitch_export.families.options import typed
from tstitch_export.families.unet.config import UNetConfig
from tstitch_export.families.unet.layout import PREFIX, module_names, rename

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LDMFamily"]

_NULLS: Final = ("none", "uniform", "mean", "zeros")
_DESCRIBING: Final = ("num_heads", "head_channels", "size", "ema")  # what a diffusers folder says itself


class LDMFamily(ClassMember):
    """sample ``[B,C,H,W]``, timestep ``[B]`` float32, labels ``[B]`` int64 -> model_output ``[B,C,H,W]``.

    The class embedder is inside the member: the tables of a pair may differ in width.

    Some published models have no null class, which guidance needs. ``null_embedding`` adds one after the others:
    ``uniform`` random numbers in [0, 1), as T-Stitch's script for these models does (one fixed draw here), the ``mean``
    of all classes, or ``zeros``.
    """

    name = "ldm"
    options: ClassVar[Mapping[str, tuple[type, str]]] = {
        "num_heads": (int, "attention heads of every block, if the widths do not determine them"),
        "head_channels": (int, "channels of an attention head, in place of num_heads"),
        "size": (int, "side of the latent, if the widths do not determine it"),
        "ema": (bool, "use the moving average of the weights if the checkpoint has one; default true"),
        "null_embedding": (str, "a null class for a table without one: none, uniform, mean or zeros"),
        "null_class": (bool, "whether the last row of the label table is the null class; by default it is"),
        "dynamic": (bool, "any height and width in place of one size"),
        **CONVENTION_OPTIONS,
    }
    choices: ClassVar[frozenset[str]] = frozenset({"null_embedding", "dynamic"})

    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        given = typed(options, self.options, what="family 'ldm'")
        null = str(given.get("null_embedding", "none"))
        if null not in _NULLS:
            raise unknown_name("null_embedding", null, _NULLS)
        said = read_options(given)
        if path.is_dir():
            if told := [name for name in _DESCRIBING if name in given]:
                raise BadInput(
                    f"{path.name} is a diffusers folder, whose config.json says {told[0]}",
                    hint=f"leave {told[0]} away for it",
                )
            found = ldm_diffusers.inspect(path, said)
        else:
            found = _original(path, given, said)
        return replace(
            found,
            labels=found.labels + (null != "none"),
            null_class=null != "none" or bool(given.get("null_class", True)),
            config={**found.config, "null_embedding": null, "dynamic": bool(given.get("dynamic", False))},
        )

    def load(self, inspection: Inspection) -> nn.Module:
        require("torch", "exporting a latent diffusion model")
        model = ldm_diffusers.load(inspection) if inspection.layout == "diffusers" else _load_original(inspection)
        _add_null(model, str(inspection.config["null_embedding"]))
        return model.eval().requires_grad_(False)

    def dims(self, inspection: Inspection) -> Mapping[str, Dim]:
        if not inspection.config["dynamic"]:
            return {}
        _, height, width = inspection.latent
        multiple = int(inspection.config["multiple"])
        return {"H": Dim(native=height, multiple=multiple), "W": Dim(native=width, multiple=multiple)}


def _original(path: Path, given: Mapping[str, Scalar], said: Conventions) -> Inspection:
    checkpoint = read_checkpoint(path)
    config = config_from_shapes(checkpoint.shapes, name=path.name, heads=_heads(given))
    size = int(given["size"]) if "size" in given else native_size(config)
    if size is None:
        raise BadCheckpoint(
            f"{path.name}: a UNet takes a latent of any size, and this one is none of the published ones",
            hint="say the side of the latent it was trained on: --option MEMBER.size=N (image_size of its config)",
        )
    if size < 1 or size % config.multiple:
        raise BadInput(
            f"{path.name}: size is {size}; allowed are multiples of {config.multiple}",
            hint=f"its {len(config.widths)} levels halve it {len(config.widths) - 1} times",
        )
    averaged = all(ema_name(name) in checkpoint.shapes for name in expected_shapes(config))
    if not averaged and any(name.startswith(EMA) for name in checkpoint.shapes) and given.get("ema", True):
        raise BadCheckpoint(
            f"{path.name} has the moving average of some of its weights only",
            hint="take the weights themselves: --option MEMBER.ema=false",
        )
    if given.get("ema") is True and not averaged:
        raise BadCheckpoint(
            f"{path.name} has no moving average of its weights ({EMA}...)", hint="leave ema away for it"
        )
    scale = (
        float(f"{checkpoint.values('scale_factor').reshape(-1)[0]:.6g}")
        if "scale_factor" in checkpoint.shapes
        else None
    )
    stated, notes = statements_of(checkpoint, said)
    return Inspection(
        family="ldm",
        layout="original",
        path=path,
        files=files_of(path),
        config={
            "model": published_name(config),
            "base": config.base,
            "widths": "-".join(map(str, config.widths)),
            "blocks": config.blocks,
            "attention": "-".join(map(str, config.attention)),
            "depth": config.depth,
            "context": config.context,
            "channels": config.channels,
            "num_heads": config.heads.number,
            "head_channels": config.heads.channels,
            "labels": config.labels,
            "multiple": config.multiple,
            "ema": averaged and bool(given.get("ema", True)),
        },
        latent=(config.channels, size, size),
        labels=config.labels,
        scaling=scale,
        shift=None if scale is None else 0.0,
        packages=("diffusers",),
        trained=conventions_of(path.name, stated, said=said, notes=notes),
    )


def _load_original(inspection: Inspection) -> nn.Module:
    diffusers = require("diffusers", f"the latent diffusion model {inspection.path.name}")
    from tstitch_export.families.assemble import Conditioned, assemble
    from tstitch_export.families.ldm.model import ClassConditional, embedding, skip_lone_softmax

    checkpoint, name = read_checkpoint(inspection.path), inspection.path.name
    heads = Heads(number=int(inspection.config["num_heads"]), channels=int(inspection.config["head_channels"]))
    config = config_from_shapes(checkpoint.shapes, name=name, heads=heads)
    stored, raw = checkpoint.tensors(), diffusers_config(config)
    names = rename(expected_shapes(config), module_names(UNetConfig(raw)), name=name)
    averaged = inspection.config["ema"]
    sources = {ours: ema_name(key) if averaged else PREFIX + key for key, ours in names.items()}
    if bad := next((key for key in (*sources.values(), TABLE) if not stored[key].isfinite().all()), None):
        raise BadCheckpoint(f"{name}: {bad} holds NaN or infinity", hint="take a checkpoint from before that")
    state = {ours: stored[source] for ours, source in sources.items()}
    inner = assemble(getattr(diffusers, ldm_diffusers.ATTENDED), raw, state, name=name)
    skip_lone_softmax(inner)
    return ClassConditional(Conditioned(inner, "encoder_hidden_states"), embedding(stored[TABLE].float()))


def _heads(given: Mapping[str, Scalar]) -> Heads | None:
    number, channels = given.get("num_heads"), given.get("head_channels")
    if number is not None and channels is not None:
        raise BadInput(
            f"num_heads is {number} and head_channels {channels}; allowed is one of the two",
            hint="give the one that the training's config has",
        )
    for name, value in (("num_heads", number), ("head_channels", channels)):
        if value is not None and int(value) < 1:
            raise BadInput(f"{name} is {value}; allowed is 1 or more", hint="see the training's config")
    if number is None and channels is None:
        return None
    return Heads(number=int(number or 0), channels=int(channels or 0))


def _add_null(model: nn.Module, kind: str) -> None:
    """Gives the class table of ``model`` one more row."""
    if kind == "none":
        return
    import torch

    from tstitch_export.families.ldm.model import embedding

    name, table = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding))
    row: Tensor = {
        "uniform": torch.rand(table.embedding_dim, generator=torch.Generator().manual_seed(0)),
        "mean": table.weight.mean(0),
        "zeros": torch.zeros(table.embedding_dim),
    }[kind]
    owner, _, attribute = name.rpartition(".")
    longer = embedding(torch.cat([table.weight, row[None]]))
    setattr(model.get_submodule(owner), attribute, longer)
