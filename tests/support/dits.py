"""Real tiny DiTs with random weights, as published state dicts and as diffusers folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["PUBLISHED_NAMES", "diffusers_folder", "published_model", "published_state", "sparse_safetensors"]

# The tensors of the published checkpoints (github.com/facebookresearch/DiT), block 0 standing for all blocks.
PUBLISHED_NAMES = [
    "pos_embed",
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight",
    "t_embedder.mlp.2.bias",
    "y_embedder.embedding_table.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.proj.weight",
    "blocks.0.attn.proj.bias",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc1.bias",
    "blocks.0.mlp.fc2.weight",
    "blocks.0.mlp.fc2.bias",
    "blocks.0.adaLN_modulation.1.weight",
    "blocks.0.adaLN_modulation.1.bias",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight",
    "final_layer.adaLN_modulation.1.bias",
]


def published_model(
    *,
    depth: int = 2,
    width: int = 32,
    heads: int = 4,
    size: int = 8,
    channels: int = 4,
    classes: int = 5,
    seed: int = 0,
) -> Any:
    """Our DiT, its classes and the null class, learned variance, every weight random (zeros would hide mistakes)."""
    import torch

    from tstitch_export.families.dit.config import DiTConfig
    from tstitch_export.families.dit.model import DiT

    torch.manual_seed(seed)
    config = DiTConfig(
        depth=depth, width=width, heads=heads, patch=2, size=size, channels=channels, classes=classes, learn_sigma=True
    )
    model = DiT(config).initialise()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def published_state(**changes: int) -> dict[str, Any]:
    return dict(published_model(**changes).state_dict())


def diffusers_folder(folder: Path, *, heads: int = 2, layers: int = 2, size: int = 8, classes: int = 5) -> Any:
    """Saves a random ``DiTTransformer2DModel`` to ``folder`` and returns it."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(1)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(folder)
    return model


def sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A well-formed file of zeros that takes no room on disk, for what is read from shapes alone."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    return path
