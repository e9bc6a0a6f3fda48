"""diffusers ``DiTTransformer2DModel`` folders, exported as diffusers itself computes them.

They can't be converted to the published layout: diffusers spaces the timestep frequencies over 127 instead of 128
intervals (``downscale_freq_shift=1``), may use another epsilon in the second norm of a block, and gives every block its
own timestep and label embedders.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

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
from tstitch_export.families.dit.layout import published_name
from tstitch_export.families.dit.training import check_variance

if TYPE_CHECKING:
    from torch import nn

__all__ = ["inspect", "load"]

_CLASS: Final = "DiTTransformer2DModel"
_LEGACY: Final = "Transformer2DModel"  # before diffusers 0.30, and other models still
_STEM: Final = "diffusion_pytorch_model"
_TABLE: Final = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
# diffusers' own defaults, for what a config.json leaves out
_DEFAULTS: Final = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
}


def inspect(path: Path, heads: int | None, said: Conventions) -> Inspection:
    """A model folder, or a pipeline folder with the model in ``transformer/``; ``said``: conventions the user gave.

    Raises ``BadCheckpoint``.
    """
    folder, config = model_folder(
        path,
        ("transformer",),
        (_CLASS, _LEGACY),
        what="is no DiT",
        hint=f"give the folder of a {_CLASS} (config.json and {_STEM}.safetensors), or a pipeline that has one",
    )
    if config["_class_name"] == _LEGACY and config.get("norm_type") != "ada_norm_zero":
        raise BadCheckpoint(
            f"{path} is no DiT: its config.json is that of another diffusers {_LEGACY}",
            hint=f"give the folder of a {_CLASS}",
        )
    values: dict[str, int] = {key: config.get(key) or default for key, default in _DEFAULTS.items()}
    if heads is not None and heads != values["num_attention_heads"]:
        raise BadCheckpoint(
            f"{path.name}: num_heads is {heads}, its config.json says {values['num_attention_heads']}",
            hint="leave num_heads away for a diffusers folder",
        )
    weights = weights_file(folder, (_STEM,))
    checkpoint = read_checkpoint(weights)
    shapes = checkpoint.shapes
    check_numbers(config, shapes, str(folder / "config.json"))
    width = values["num_attention_heads"] * values["attention_head_dim"]
    channels, patch, size = values["in_channels"], values["patch_size"], values["sample_size"]
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise BadCheckpoint(
            f"{path.name}: out_channels is {out_channels}; allowed are {channels} or {2 * channels} (learned variance)",
            hint="this model predicts something else than noise, v or the picture",
        )
    labels = shapes[_TABLE][0] if _TABLE in shapes else 1 + (config.get("num_embeds_ada_norm") or 1000)
    wanted = {
        "pos_embed.proj.weight": (width, channels, patch, patch),
        "proj_out_2.weight": (patch * patch * out_channels, width),
        _TABLE: (labels, width),
    }
    check_config(wanted, shapes, weights)
    stated, notes = statements_of(checkpoint, said)
    training = [*read_pipeline(path, said).training, *stated]
    if out_channels != channels and said.prediction is None and not training:
        check_variance(checkpoint, "proj_out_2", channels)
    return Inspection(
        family="dit",
        layout="diffusers",
        path=folder,
        files=(folder / "config.json", *files_of(weights)),
        config={
            "model": published_name(values["num_layers"], width, patch),
            "depth": values["num_layers"],
            "width": width,
            "heads": values["num_attention_heads"],
            "patch": patch,
            "size": size,
            "channels": channels,
            "labels": labels,
            "learn_sigma": out_channels != channels,
        },
        latent=(channels, size, size),
        labels=labels,
        learned_variance=out_channels != channels,
        trained=conventions_of(path.name, training, said=said, notes=notes),
    )


def load(inspection: Inspection) -> nn.Module:
    """diffusers' module behind the member signature."""
    diffusers = require("diffusers", f"the diffusers folder {inspection.path.name}")
    from tstitch_export.families.assemble import Conditioned, assemble

    config, *_, weights = inspection.files
    state = read_checkpoint(weights).tensors()
    inner = assemble(getattr(diffusers, _CLASS), read_json(config) or {}, state, name=weights.name)
    return Conditioned(inner, "class_labels").eval()
