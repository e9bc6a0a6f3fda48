"""The layout of class-conditional latent diffusion checkpoints (arXiv 2112.10752), from names and shapes. No torch.

A checkpoint is the state dict of the whole model: the UNet under ``model.diffusion_model.``, the moving average of its
weights under ``model_ema.`` (names without dots), the class table ``cond_stage_model.embedding.weight``, the
autoencoder under ``first_stage_model.``, and the noise schedule as buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes, compare, layer, looks_like
from tstitch_export.families.unet.config import flat
from tstitch_export.families.unet.layout import PREFIX, way_down

__all__ = [
    "EMA",
    "TABLE",
    "Heads",
    "LDMConfig",
    "config_from_shapes",
    "diffusers_config",
    "ema_name",
    "expected_shapes",
    "native_size",
    "published_name",
]

EMA: Final = "model_ema."
TABLE: Final = "cond_stage_model.embedding.weight"
_KIND: Final = "latent diffusion UNet"
_WHOLE: Final = "give the whole checkpoint of a class-conditional latent diffusion model, as its training saved it"
_GROUPS: Final = 32  # of every group norm


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How many attention heads a block of ``width`` channels has: ``number``, or one for every ``channels``."""

    number: int = 0
    channels: int = 0

    def of(self, width: int) -> int:
        return self.number or width // self.channels


@dataclass(frozen=True, kw_only=True)
class LDMConfig:
    """One UNet: ``widths`` of its levels, each with ``blocks`` residual blocks (one more on the way up).

    ``attention``: the levels, 0 the finest, whose blocks are followed by ``depth`` transformer blocks; the middle has
    them always. ``context``: the width of the one token that the class is.
    """

    base: int
    channels: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    depth: int
    context: int
    labels: int
    heads: Heads

    @property
    def multiple(self) -> int:
        """Height and width of the latent are multiples of it: every level but the last halves them."""
        return int(2 ** (len(self.widths) - 1))


# What was published: (channels, widths) -> (name, heads, latent side). The heads leave no trace in the shapes.
# cin256-v2 and cin-ldm-vq-f8 are from github.com/CompVis/latent-diffusion, the narrow ones from T-Stitch.
_PUBLISHED: Final = {
    (3, (192, 384, 576, 960)): ("LDM-4 (cin256-v2)", Heads(number=1), 64),
    (3, (64, 128, 192, 320)): ("LDM-4-S (cin256-v2-lite)", Heads(number=1), 64),
    (4, (256, 512, 1024)): ("LDM-8 (cin-ldm-vq-f8)", Heads(channels=32), 32),
    (4, (64, 128, 256)): ("LDM-8-S (cin-ldm-vq-f8-lite)", Heads(channels=32), 32),
}


def published_name(config: LDMConfig) -> str:
    found = _PUBLISHED.get((config.channels, config.widths))
    return found[0] if found else "LDM"


def native_size(config: LDMConfig) -> int | None:
    """The side of the latent that the published model was trained on."""
    found = _PUBLISHED.get((config.channels, config.widths))
    return found[2] if found else None


def ema_name(name: str) -> str:
    """Where the moving average of the UNet's tensor ``name`` is kept."""
    return EMA + ("diffusion_model." + name).replace(".", "")


def expected_shapes(config: LDMConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the UNet, by its name in the UNet."""
    shapes: dict[str, tuple[int, ...]] = {}
    time = 4 * config.base

    def weights(name: str, *shape: int) -> None:
        shapes.update(layer(name, *shape))

    def residual(name: str, before: int, after: int) -> None:
        weights(f"{name}.in_layers.0", before)
        weights(f"{name}.in_layers.2", after, before, 3, 3)
        weights(f"{name}.emb_layers.1", after, time)
        weights(f"{name}.out_layers.0", after)
        weights(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            weights(f"{name}.skip_connection", after, before, 1, 1)

    def transformer(name: str, width: int) -> None:
        weights(f"{name}.norm", width)
        weights(f"{name}.proj_in", width, width, 1, 1)
        weights(f"{name}.proj_out", width, width, 1, 1)
        for index in range(config.depth):
            block = f"{name}.transformer_blocks.{index}"
            for attention, context in (("attn1", width), ("attn2", config.context)):
                shapes[f"{block}.{attention}.to_q.weight"] = (width, width)
                shapes[f"{block}.{attention}.to_k.weight"] = (width, context)
                shapes[f"{block}.{attention}.to_v.weight"] = (width, context)
                weights(f"{block}.{attention}.to_out.0", width, width)
            weights(f"{block}.ff.net.0.proj", 8 * width, width)
            weights(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                weights(f"{block}.{norm}", width)

    weights("time_embed.0", time, config.base)
    weights("time_embed.2", time, time)
    weights("input_blocks.0.0", config.base, config.channels, 3, 3)
    before, kept, index, last = config.base, [config.base], 1, len(config.widths) - 1
    for level, width in enumerate(config.widths):
        for _ in range(config.blocks):
            residual(f"input_blocks.{index}.0", before, width)
            if level in config.attention:
                transformer(f"input_blocks.{index}.1", width)
            before, index = width, index + 1
            kept.append(width)
        if level < last:
            weights(f"input_blocks.{index}.0.op", width, width, 3, 3)
            kept.append(width)
            index += 1
    residual("middle_block.0", before, before)
    transformer("middle_block.1", before)
    residual("middle_block.2", before, before)
    index = 0
    for level, width in reversed(list(enumerate(config.widths))):
        for block in range(config.blocks + 1):
            residual(f"output_blocks.{index}.0", before + kept.pop(), width)
            place = 1
            if level in config.attention:
                transformer(f"output_blocks.{index}.1", width)
                place = 2
            if level and block == config.blocks:
                weights(f"output_blocks.{index}.{place}.conv", width, width, 3, 3)
            before, index = width, index + 1
    weights("out.0", before)
    weights("out.2", config.channels, config.base, 3, 3)
    return shapes


def diffusers_config(config: LDMConfig) -> dict[str, Any]:
    """The configuration of diffusers' ``UNet2DConditionModel`` that computes the same."""
    attended = [level in config.attention for level in range(len(config.widths))]
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "cross_attention_dim": config.context,
        "attention_head_dim": [config.heads.of(width) for width in config.widths],  # diffusers' name for their number
        "transformer_layers_per_block": config.depth,
    }


def config_from_shapes(shapes: Shapes, *, name: str, heads: Heads | None) -> LDMConfig:
    """The configuration that a checkpoint's shapes determine; ``name`` is the file's, for messages.

    Raises ``BadCheckpoint`` for another kind of model, for one that lacks its class table, and where the number of
    attention heads is neither given nor that of a published model.
    """
    unet = {key.removeprefix(PREFIX): shape for key, shape in shapes.items() if key.startswith(PREFIX)}
    if "input_blocks.0.0.weight" not in unet or len(unet["input_blocks.0.0.weight"]) != 4 or "out.2.weight" not in unet:
        raise BadCheckpoint(
            f"{name} is no class-conditional latent diffusion model: it looks like {looks_like(shapes)}", hint=_WHOLE
        )
    if TABLE not in shapes or len(shapes[TABLE]) != 2:
        conditioned = next((key for key in shapes if key.startswith("cond_stage_model.")), None)
        what = f"text or something else ({conditioned})" if conditioned else "nothing that is in the file"
        raise BadCheckpoint(
            f"{name} has no class table {TABLE}: it is a latent diffusion model conditioned on {what}",
            hint="for Stable Diffusion use family unet-sd; else " + _WHOLE,
        )
    base, channels = unet["input_blocks.0.0.weight"][:2]
    context = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1]
    labels, columns = shapes[TABLE]
    if not context:
        raise BadCheckpoint(
            f"{name}: its attention has no cross-attention, so the class can't reach it that way",
            hint="models conditioned by label_emb or concatenation are not supported",
        )
    if context != columns:
        raise BadCheckpoint(
            f"{name}: the class table has {columns} columns, its cross-attention takes {context}",
            hint="UNet and class embedder of one checkpoint belong together",
        )
    raw = way_down(unet, name=name, kind=_KIND, hint=_WHOLE)
    widths = tuple(raw["block_out_channels"])
    if any(width % _GROUPS for width in widths) or widths[:1] != (base,):
        raise BadCheckpoint(
            f"{name}: its levels have {', '.join(map(str, widths))} channels; allowed are multiples of {_GROUPS} that "
            f"begin with the {base} of its first convolution",
            hint=_WHOLE,
        )
    config = LDMConfig(
        base=base,
        channels=channels,
        widths=widths,
        blocks=raw["layers_per_block"][0],
        attention=tuple(level for level, block in enumerate(raw["down_block_types"]) if "CrossAttn" in block),
        depth=max(flat(raw["transformer_layers_per_block"])),
        context=context,
        labels=labels,
        heads=_heads(heads, channels, widths, name),
    )
    compare(expected_shapes(config), unet, name, _KIND, _WHOLE)
    return config


def _heads(given: Heads | None, channels: int, widths: tuple[int, ...], name: str) -> Heads:
    published = _PUBLISHED.get((channels, widths))
    heads = given or (published[1] if published else None)
    if heads is None:
        known = ", ".join(row[0] for row in _PUBLISHED.values())
        raise BadCheckpoint(
            f"{name}: a UNet of {', '.join(map(str, widths))} channels may have any number of attention heads; known "
            f"are those of {known}",
            hint="say it: --option MEMBER.head_channels=N (num_head_channels of the training's config) or "
            "--option MEMBER.num_heads=N",
        )
    for width in widths:
        if (heads.number and width % heads.number) or (heads.channels and width % heads.channels):
            what = f"{heads.number} attention heads" if heads.number else f"heads of {heads.channels} channels"
            raise BadCheckpoint(
                f"{name}: {what} do not divide a level's {width} channels",
                hint="give num_heads or num_head_channels of the training's config",
            )
    return heads
