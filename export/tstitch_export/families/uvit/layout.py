"""The published layout of a U-ViT state dict and what its shapes say about the model. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes, compare, layer, looks_like
from tstitch_export.families.dit.layout import heads_of, letter_of

__all__ = [
    "NOISE",
    "PUBLISHED_SIZES",
    "Time",
    "UViTConfig",
    "config_from_shapes",
    "expected_shapes",
    "published_name",
    "time_of",
]

# How the network is told the noise level, and with which noise it was trained (see `model.network_time`).
Time = Literal["discrete", "continuous"]
NOISE: Final[dict[str, NoiseScheduleSpec]] = {
    "discrete": NoiseScheduleSpec(kind="scaled-linear", steps=1000, beta_start=0.00085, beta_end=0.012),
    "continuous": NoiseScheduleSpec(kind="linear", steps=1000, beta_start=1e-4, beta_end=0.02),
}

# letter -> (blocks, width), arXiv 2209.12152, table 1: the block in the middle is one of them
PUBLISHED_SIZES: Final = {"S": (13, 512), "M": (17, 768), "L": (21, 1024), "H": (29, 1152)}
_HEADS: Final = {512: 8, 768: 12, 1024: 16, 1152: 16}  # the same table: they leave no trace in the shapes
# The published training commands: H on Stable Diffusion's discrete times, the others on a continuous one.
_TIMES: Final[dict[str, Time]] = {"S": "continuous", "M": "continuous", "L": "continuous", "H": "discrete"}
_SIGNATURE: Final = ("patch_embed.proj.weight", "pos_embed", "decoder_pred.weight", "mid_block.attn.qkv.weight")
_WHOLE: Final = "give the whole state dict of a U-ViT (nnet_ema.pth), with the parameter names of the published ones"
_EXTRAS: Final = 2  # tokens before the patches: label, then time


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """One U-ViT: ``depth`` blocks, one of them in the middle; ``size`` is the side of the latent.

    ``mlp_time``: the time features go through two layers; ``conv``: a 3x3 convolution at the end.
    """

    depth: int
    width: int
    heads: int
    patch: int
    size: int
    channels: int
    labels: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time: bool = False
    conv: bool = True

    @property
    def grid(self) -> int:
        return self.size // self.patch


def published_name(depth: int, width: int, patch: int) -> str:
    """``U-ViT-H/2`` for a published size, else ``U-ViT``."""
    letter = letter_of(PUBLISHED_SIZES, depth, width)
    return f"U-ViT-{letter}/{patch}" if letter else "U-ViT"


def time_of(given: str | None, config: UViTConfig, name: str) -> Time:
    """``given``, or the time convention of the published size. Raises ``BadCheckpoint`` where neither tells."""
    if given is None:
        letter = letter_of(PUBLISHED_SIZES, config.depth, config.width)
        if letter is None:
            raise BadCheckpoint(
                f"{name}: a U-ViT of {config.depth} blocks and width {config.width} is none of the published sizes, so "
                "its shapes don't tell with which noise it was trained; time may be "
                "discrete (Stable Diffusion's noise, timesteps 1 to 1000) or continuous (the linear VP SDE)",
                hint="say it: --option MEMBER.time=discrete (train_ldm_discrete.py) or continuous (train_ldm.py)",
            )
        return _TIMES[letter]
    if given in get_args(Time):
        return cast("Time", given)
    raise BadCheckpoint(
        f"{name}: time is {given!r}; allowed are {', '.join(get_args(Time))}",
        hint="discrete is train_ldm_discrete.py, continuous is train_ldm.py of the published code",
    )


def expected_shapes(config: UViTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published state dict of this configuration."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)

    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, _EXTRAS + config.grid**2, width),
        **layer("patch_embed.proj", width, config.channels, config.patch, config.patch),
        "label_emb.weight": (config.labels, width),
        **layer("norm", width),
        **layer("decoder_pred", config.patch**2 * config.channels, width),
    }
    if config.mlp_time:
        shapes |= layer("time_embed.0", 4 * width, width) | layer("time_embed.2", width, 4 * width)
    if config.conv:
        shapes |= layer("final_layer", config.channels, config.channels, 3, 3)
    half = config.depth // 2
    blocks = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    for block in blocks:
        shapes |= layer(f"{block}.norm1", width) | layer(f"{block}.norm2", width)
        shapes |= layer(f"{block}.attn.proj", width, width)
        shapes |= layer(f"{block}.mlp.fc1", hidden, width) | layer(f"{block}.mlp.fc2", width, hidden)
        shapes[f"{block}.attn.qkv.weight"] = (3 * width, width)
        if config.qkv_bias:
            shapes[f"{block}.attn.qkv.bias"] = (3 * width,)
        if block.startswith("out_blocks."):
            shapes |= layer(f"{block}.skip_linear", width, 2 * width)
    return shapes


def config_from_shapes(shapes: Shapes, *, name: str, heads: int | None) -> UViTConfig:
    """The configuration that a state dict's shapes determine; ``name`` is the file's, for messages.

    The latent's side is sqrt(positions - 2) x patch, the two being the label's and the time's. Raises
    ``BadCheckpoint``.
    """
    if not all(key in shapes for key in _SIGNATURE) or len(shapes["patch_embed.proj.weight"]) != 4:
        raise BadCheckpoint(f"{name} is no U-ViT: it looks like {looks_like(shapes)}", hint=_WHOLE)
    if "label_emb.weight" not in shapes:
        kind = "text-to-image" if any(key.startswith("context_embed") for key in shapes) else "unconditional"
        raise BadCheckpoint(
            f"{name} is a U-ViT without label_emb: it looks like an {kind} one".replace("an text", "a text"),
            hint="members of this family are class-conditional: give one of the published ImageNet checkpoints",
        )
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    tokens = shapes["pos_embed"][1] - _EXTRAS if len(shapes["pos_embed"]) == 3 else 0
    grid = math.isqrt(max(tokens, 0))
    if tokens < 1 or grid * grid != tokens:
        raise BadCheckpoint(
            f"{name}: pos_embed has shape {list(shapes['pos_embed'])}; allowed is [1, 2 + n*n, width], label, time and "
            "a square latent",
            hint="U-ViTs for pictures that are not square can't be told from their shapes and are not supported",
        )
    half = len({key.split(".")[1] for key in shapes if key.startswith("in_blocks.")})
    config = UViTConfig(
        depth=2 * half + 1,
        width=width,
        heads=heads_of(heads, width, _HEADS, name, "U-ViT"),
        patch=patch,
        size=grid * patch,
        channels=channels,
        labels=shapes["label_emb.weight"][0],
        mlp_ratio=shapes.get("mid_block.mlp.fc1.weight", (4 * width,))[0] / width,
        qkv_bias="mid_block.attn.qkv.bias" in shapes,
        mlp_time="time_embed.0.weight" in shapes,
        conv="final_layer.weight" in shapes,
    )
    compare(expected_shapes(config), shapes, name, "U-ViT", _WHOLE)
    return config
