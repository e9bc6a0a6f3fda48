"""The ranges of what a ``config.json`` of diffusers or transformers may say, whatever the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.manifest import Channels, Scale, Shift, Side
from tstitch_engines.errors import BadCheckpoint

__all__ = ["check_model_config"]

_Width = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_Layers = Annotated[int, msgspec.Meta(ge=0, le=256)]
_Blocks = msgspec.Meta(min_length=1, max_length=16)
_Class = Annotated[str, msgspec.Meta(max_length=200)]
_Classes = Annotated[list[_Class | None], msgspec.Meta(max_length=16)]
_PerLevel = Annotated[list[Channels], _Blocks]
_Depths = Annotated[list[_Layers | Annotated[list[_Layers], msgspec.Meta(max_length=64)]], _Blocks]


class _ModelConfig(msgspec.Struct):
    """Every key that an exporter reads, and those that decide how much diffusers builds; ``null`` is as absent."""

    _class_name: _Class | None = None
    architectures: _Classes | None = None
    in_channels: Channels | None = None
    out_channels: Channels | None = None
    latent_channels: Channels | None = None
    sample_size: Side | Annotated[list[Side], msgspec.Meta(min_length=2, max_length=2)] | None = None
    block_out_channels: _PerLevel | None = None
    encoder_block_out_channels: _PerLevel | None = None
    decoder_block_out_channels: _PerLevel | None = None
    num_encoder_blocks: _Depths | None = None
    num_decoder_blocks: _Depths | None = None
    down_block_types: _Classes | None = None
    up_block_types: _Classes | None = None
    mid_block_type: _Class | None = None
    layers_per_block: _Layers | _Depths | None = None
    transformer_layers_per_block: _Layers | _Depths | None = None
    reverse_transformer_layers_per_block: _Layers | _Depths | None = None
    cross_attention_dim: _Width | Annotated[list[_Width], _Blocks] | None = None
    attention_head_dim: Channels | _PerLevel | None = None
    num_attention_heads: Channels | _PerLevel | None = None
    norm_num_groups: Channels | None = None
    num_vq_embeddings: _Width | None = None
    addition_time_embed_dim: _Width | None = None
    projection_class_embeddings_input_dim: _Width | None = None
    time_cond_proj_dim: _Width | None = None
    conditioning_embedding_out_channels: _PerLevel | None = None
    num_layers: _Layers | None = None
    patch_size: Channels | None = None
    num_embeds_ada_norm: _Width | None = None
    scaling_factor: Scale | None = None
    shift_factor: Shift | None = None
    force_upcast: bool | None = None
    vocab_size: _Width | None = None
    hidden_size: _Width | None = None
    intermediate_size: _Width | None = None
    num_hidden_layers: _Layers | None = None
    max_position_embeddings: _Width | None = None
    layer_norm_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    hidden_act: _Class | None = None


def check_model_config(config: dict[str, Any], file: Path) -> None:
    """Raises ``BadCheckpoint`` naming the key of ``config`` that can't be, and its value."""
    try:
        convert(config, _ModelConfig, word="key")
    except DecodeError as error:
        raise BadCheckpoint(
            f"{file}: {error.message}", hint="download or copy it again, with the weights it belongs to"
        ) from None
