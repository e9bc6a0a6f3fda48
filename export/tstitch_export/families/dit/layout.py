"""The published layout of a DiT state dict, and what other checkpoints look like. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import DIT_SIGNATURE, Shapes, compare, layer, looks_like
from tstitch_export.families.dit.config import PUBLISHED_HEADS, DiTConfig

__all__ = ["PUBLISHED_SIZES", "config_from_shapes", "expected_shapes", "heads_of", "letter_of", "published_name"]

# letter -> (depth, width), arXiv 2212.09748, table 1
PUBLISHED_SIZES: Final = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}

_WHOLE: Final = "give the whole state dict of a DiT, with the parameter names of the published checkpoints"


def letter_of(sizes: Mapping[str, tuple[int, int]], depth: int, width: int) -> str | None:
    """The published size with this depth and width."""
    return next((name for name, size in sizes.items() if size == (depth, width)), None)


def published_name(depth: int, width: int, patch: int) -> str:
    """``DiT-XL/2`` for a published size, else ``DiT``."""
    letter = letter_of(PUBLISHED_SIZES, depth, width)
    return f"DiT-{letter}/{patch}" if letter else "DiT"


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published state dict of this configuration."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.grid**2, width),
        **layer("x_embedder.proj", width, config.channels, config.patch, config.patch),
        "y_embedder.embedding_table.weight": (config.classes + int(config.null_class), width),
        **layer("t_embedder.mlp.0", width, 256),
        **layer("t_embedder.mlp.2", width, width),
        **layer("final_layer.linear", config.patch**2 * config.out_channels, width),
        **layer("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for index in range(config.depth):
        block = f"blocks.{index}"
        shapes |= layer(f"{block}.attn.qkv", 3 * width, width) | layer(f"{block}.attn.proj", width, width)
        shapes |= layer(f"{block}.mlp.fc1", hidden, width) | layer(f"{block}.mlp.fc2", width, hidden)
        shapes |= layer(f"{block}.adaLN_modulation.1", 6 * width, width)
    return shapes


def config_from_shapes(shapes: Shapes, *, name: str, heads: int | None) -> DiTConfig:
    """The configuration that a state dict's shapes determine; ``name`` is the file's, for messages.

    The latent's side is sqrt(positions) x patch; the final layer has patch^2 x channels rows, twice that with a
    learned variance; the label table's last row is the null class. ``heads`` leave no trace in the shapes: ``None``
    takes those of the published width. Raises ``BadCheckpoint``.
    """
    if not all(key in shapes for key in DIT_SIGNATURE) or len(shapes["x_embedder.proj.weight"]) != 4:
        raise BadCheckpoint(
            f"{name} is no DiT: it looks like {looks_like(shapes)}",
            hint=f"{_WHOLE}; a member of another kind needs another family in the recipe",
        )
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    tokens = shapes["pos_embed"][1] if len(shapes["pos_embed"]) == 3 else 0
    grid = math.isqrt(tokens)
    if not tokens or grid * grid != tokens:
        raise BadCheckpoint(
            f"{name}: pos_embed has shape {list(shapes['pos_embed'])}; allowed is [1, n*n, width], a square latent",
            hint="DiTs for pictures that are not square can't be told from their shapes and are not supported",
        )
    rows = shapes.get("final_layer.linear.weight", (0,))[0]
    per_pixel, rest = divmod(rows, patch * patch * channels)
    if rest or per_pixel not in (1, 2):
        raise BadCheckpoint(
            f"{name}: final_layer.linear has {rows} outputs; allowed are {patch * patch * channels} (patch^2 x "
            f"channels) or {2 * patch * patch * channels} (with learned variance)",
            hint=_WHOLE,
        )
    depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    hidden = shapes.get("blocks.0.mlp.fc1.weight", (4 * width,))[0]
    config = DiTConfig(
        depth=depth,
        width=width,
        heads=heads_of(heads, width, PUBLISHED_HEADS, name, "DiT"),
        patch=patch,
        size=grid * patch,
        channels=channels,
        classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
        learn_sigma=per_pixel == 2,
        mlp_ratio=hidden / width,
    )
    compare(expected_shapes(config), shapes, name, "DiT", _WHOLE)
    return config


def heads_of(given: int | None, width: int, published: Mapping[int, int], name: str, kind: str) -> int:
    """The attention heads: ``given``, or the ``published`` number for the width. Raises ``BadCheckpoint``."""
    heads = published.get(width) if given is None else given
    if heads is None:
        known = ", ".join(f"{heads} at width {width}" for width, heads in published.items())
        raise BadCheckpoint(
            f"{name}: a {kind} of width {width} may have any number of attention heads; known are {known}",
            hint="say it: --option MEMBER.num_heads=N, or options = { num_heads = N } at the member in a recipe",
        )
    if heads < 1 or width % heads:
        raise BadCheckpoint(
            f"{name}: {heads} attention heads do not divide the width {width}",
            hint="give the number the model was trained with: --option MEMBER.num_heads=N",
        )
    return heads
