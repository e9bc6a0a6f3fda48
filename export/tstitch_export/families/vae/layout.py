"""The original layout of latent diffusion's autoencoders, and what its shapes say about them. No torch.

The names are those of github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py; they are mapped to
diffusers' AutoencoderKL and VQModel. A whole Stable Diffusion file keeps them under ``first_stage_model.``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.signatures import Shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREFIX", "SDXL_MARK", "config_from_shapes", "diffusers_names", "diffusers_tensor", "modern"]

PREFIX: Final = "first_stage_model."
SDXL_MARK: Final = "conditioner.embedders."  # prefix that only SDXL's whole files have

_IGNORED: Final = ("loss.", "model_ema.", "discriminator.")
# original name -> diffusers' name; the decoder's levels are counted from the latent already
_RULES: Final = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"((?:encoder|decoder)\.conv_(?:in|out)|(?:post_)?quant_conv)\.(weight|bias)", r"\1.\2"),
        (r"quantize\.embedding\.weight", r"quantize.embedding.weight"),
        (r"encoder\.down\.(\d+)\.block\.(\d+)\.(.+)", r"encoder.down_blocks.\1.resnets.\2.\3"),
        (r"decoder\.up\.(\d+)\.block\.(\d+)\.(.+)", r"decoder.up_blocks.\1.resnets.\2.\3"),
        (r"encoder\.down\.(\d+)\.downsample\.(conv\.\w+)", r"encoder.down_blocks.\1.downsamplers.0.\2"),
        (r"decoder\.up\.(\d+)\.upsample\.(conv\.\w+)", r"decoder.up_blocks.\1.upsamplers.0.\2"),
        (r"(encoder|decoder)\.mid\.block_1\.(.+)", r"\1.mid_block.resnets.0.\2"),
        (r"(encoder|decoder)\.mid\.block_2\.(.+)", r"\1.mid_block.resnets.1.\2"),
        (r"(encoder|decoder)\.mid\.attn_1\.norm\.(weight|bias)", r"\1.mid_block.attentions.0.group_norm.\2"),
        (r"(encoder|decoder)\.mid\.attn_1\.([qkv]\.(?:weight|bias))", r"\1.mid_block.attentions.0.to_\2"),
        (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.(weight|bias)", r"\1.mid_block.attentions.0.to_out.0.\2"),
        (r"(encoder|decoder)\.norm_out\.(weight|bias)", r"\1.conv_norm_out.\2"),
    )
)
# Attention before diffusers 0.12
_OLD: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern(name: str) -> str:
    """A parameter of an older diffusers folder under today's name."""
    head, _, kind = name.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{_OLD[last]}.{kind}" if last in _OLD and ".attentions." in name else name


def diffusers_names(shapes: Shapes, prefix: str) -> dict[str, str]:
    """diffusers' name -> the stored one. Raises ``BadCheckpoint`` for a tensor that no such autoencoder has."""
    levels = _levels(shapes, prefix)
    found: dict[str, str] = {}
    for source in shapes:
        name = source.removeprefix(prefix)
        if not source.startswith(prefix) or name.startswith(_IGNORED):
            continue
        target = _target(name, levels)
        if target is None:
            raise BadCheckpoint(
                f"{source} is no tensor of an autoencoder that this exporter knows",
                hint="give the vae folder of a diffusers pipeline instead",
            )
        found[target] = source
    return found


def diffusers_tensor(name: str, stored: Tensor) -> Tensor:
    """Attention is stored as 1x1 convolutions, which are matrices in diffusers."""
    return stored[:, :, 0, 0] if ".attentions." in name and stored.ndim == 4 else stored


def config_from_shapes(shapes: Shapes, prefix: str, *, what: str) -> dict[str, Any]:
    """The config.json that diffusers would write. Raises ``BadCheckpoint`` where the tensors that tell are missing."""
    levels = _levels(shapes, prefix)

    def shape(name: str) -> tuple[int, ...]:
        if prefix + name not in shapes:
            raise BadCheckpoint(f"{what} lacks {prefix}{name}", hint="download or copy it again")
        return shapes[prefix + name]

    channels = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    layers = sum(name.startswith(f"{prefix}encoder.down.0.block.") and name.endswith("conv1.weight") for name in shapes)
    quantised = f"{prefix}quantize.embedding.weight" in shapes
    config: dict[str, Any] = {
        "_class_name": "VQModel" if quantised else "AutoencoderKL",
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "mid_block_add_attention": f"{prefix}encoder.mid.attn_1.q.weight" in shapes,
        "sample_size": 256,
    }
    if quantised:
        entries, width = shape("quantize.embedding.weight")
        # Latent diffusion's VQ models were trained without a scale.
        return config | {"num_vq_embeddings": entries, "vq_embed_dim": width, "scaling_factor": 1.0}
    xl = any(name.startswith(SDXL_MARK) for name in shapes)
    return config | {"scaling_factor": 0.13025 if xl else 0.18215, "sample_size": 1024 if xl else 512}


def _levels(shapes: Shapes, prefix: str) -> int:
    found = (re.match(r"encoder\.down\.(\d+)\.", name.removeprefix(prefix)) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _target(name: str, levels: int) -> str | None:
    # the original counts the decoder's levels from the picture, diffusers from the latent
    name = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
    found = (match.expand(target) for pattern, target in _RULES if (match := pattern.fullmatch(name)))
    return next((target.replace("nin_shortcut", "conv_shortcut") for target in found), None)
