"""Class-conditional latent diffusion models as diffusers keeps them, exported as diffusers itself computes them.

Either a ``UNet2DModel`` with ``num_class_embeds`` (the class is added to the time), or a ``UNet2DConditionModel``
beside a folder ``class_embedder`` with one table ``[labels, cross_attention_dim]`` (the class is one token of context).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.needs import require
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.config_limits import check_numbers
from tstitch_export.checkpoint.conventions import Conventions, conventions_of
from tstitch_export.checkpoint.folder import files_of, model_folder, read_json, weights_file
from tstitch_export.checkpoint.pipeline import read_pipeline
from tstitch_export.checkpoint.signatures import check_config
from tstitch_export.checkpoint.statements import statements_of
from tstitch_export.families.base import Inspection

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ATTENDED", "inspect", "load"]

_ADDED: Final = "UNet2DModel"
ATTENDED: Final = "UNet2DConditionModel"
_STEM: Final = "diffusion_pytorch_model"
_EMBEDDER: Final = "class_embedder"
# diffusers' own defaults, for what a config.json leaves out
_CHANNELS: Final = {_ADDED: ((3, 3), (224, 448, 672, 896)), ATTENDED: ((4, 4), (320, 640, 1280, 1280))}


def inspect(path: Path, said: Conventions) -> Inspection:
    """A model folder, or a pipeline folder with the model in ``unet/``; ``said``: conventions the user gave.

    Raises ``BadCheckpoint``.
    """
    folder, config = model_folder(
        path,
        ("unet",),
        _CHANNELS,
        what="is no class-conditional latent diffusion model",
        hint=f"give the folder of a {_ADDED} or {ATTENDED}, a pipeline that has one, or the original checkpoint",
    )
    kind = config["_class_name"]
    if config.get("class_embed_type") is not None:
        raise BadCheckpoint(
            f"{path.name}: class_embed_type is {config['class_embed_type']!r}; allowed is a table of classes (null)",
            hint="models whose class is no label are not supported",
        )
    (default_in, default_out), widths = _CHANNELS[kind]
    channels, out = config.get("in_channels") or default_in, config.get("out_channels") or default_out
    widths = config.get("block_out_channels") or widths
    if out != channels:
        raise BadCheckpoint(
            f"{path.name}: it has {channels} channels in and {out} out; allowed is the same number",
            hint="this model predicts something else than noise, v or the picture",
        )
    weights = weights_file(folder, [_STEM])
    checkpoint = read_checkpoint(weights)
    shapes = checkpoint.shapes
    check_numbers(config, shapes, str(folder / "config.json"))
    check_config({"conv_in.weight": (widths[0], channels, 3, 3)}, shapes, weights)
    files, labels = _classes(path, folder, config, weights, shapes)
    height, width = _size(path, config.get("sample_size"))
    facts = read_pipeline(path, said)
    stated, notes = statements_of(checkpoint, said)
    trained = conventions_of(path.name, [*facts.training, *stated], said=said, notes=notes)
    return Inspection(
        family="ldm",
        layout="diffusers",
        path=path,
        files=files,
        config={
            "model": kind,
            "widths": "-".join(map(str, widths)),
            "channels": channels,
            "labels": labels,
            "multiple": 2 ** (len(widths) - 1),
        },
        latent=(channels, height, width),
        labels=labels,
        scaling=facts.scaling,
        shift=facts.shift,
        scheduler=facts.scheduler_of(trained),
        trained=trained,
    )


def load(inspection: Inspection) -> nn.Module:
    """The model as ``(sample, timestep, labels)``."""
    diffusers = require("diffusers", f"the diffusers folder {inspection.path.name}")

    from tstitch_export.families.assemble import Conditioned, assemble
    from tstitch_export.families.ldm.model import ClassConditional, embedding

    file, *others, weights = inspection.files
    tables = [other for other in others if other.parent.name == _EMBEDDER]  # others are shards of the weights
    kind = str(inspection.config["model"])
    state = read_checkpoint(weights).tensors()
    inner = assemble(getattr(diffusers, kind), read_json(file) or {}, state, name=inspection.path.name)
    unet = Conditioned(inner, "encoder_hidden_states" if kind == ATTENDED else "class_labels")
    if not tables:
        return unet
    (table,) = read_checkpoint(tables[0]).tensors().values()
    return ClassConditional(unet, embedding(table.float()))


def _classes(
    path: Path, folder: Path, config: dict[str, Any], weights: Path, shapes: dict[str, tuple[int, ...]]
) -> tuple[tuple[Path, ...], int]:
    """The files, and how many classes the model knows."""
    own = shapes.get("class_embedding.weight")
    if config["_class_name"] == _ADDED:
        if own is None:
            raise BadCheckpoint(
                f"{path.name} is a {_ADDED} without num_class_embeds: it draws without a class",
                hint="members of this family are class-conditional",
            )
        return (folder / "config.json", *files_of(weights)), own[0]
    beside = next((base / _EMBEDDER for base in (path, folder.parent) if (base / _EMBEDDER).is_dir()), None)
    if beside is None or own is not None:
        raise BadCheckpoint(
            f"{path} is a {ATTENDED} "
            + ("with num_class_embeds" if own else f"and has no {_EMBEDDER} folder beside it")
            + ": its context is text or something else",
            hint="for Stable Diffusion use family unet-sd; a class-conditional one has its table in class_embedder/",
        )
    table = files_of(weights_file(beside, [_STEM, "model"]))[0]
    found = read_checkpoint(table).shapes
    wanted = config.get("cross_attention_dim") or 1280
    shape = next(iter(found.values())) if len(found) == 1 else ()
    if len(shape) != 2 or shape[1] != wanted:
        stated = ", ".join(f"{name} {list(size)}" for name, size in list(found.items())[:3])
        raise BadCheckpoint(
            f"{table} holds {stated}; allowed is one table [labels, {wanted}]",
            hint="save the nn.Embedding's state dict",
        )
    return (folder / "config.json", table, *files_of(weights)), shape[0]


def _size(path: Path, size: object) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    raise BadCheckpoint(
        f"{path.name}: its config.json has the sample_size {size!r}; allowed is a number or [height, width]",
        hint="write the latent's size into config.json",
    )
