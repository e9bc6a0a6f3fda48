"""The UNet of latent diffusion (arXiv 2112.10752) behind its own class table.

Written after the paper (section 3.3 and appendix E) and ADM's residual blocks; parameter names follow the published
checkpoints, so that those load without a key map. Importing this module imports torch; only the exporter does so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tstitch_export.families.dit.model import timestep_features
from tstitch_export.families.ldm.layout import LDMConfig

__all__ = ["ClassConditional", "UNet", "embedding"]


class ResBlock(nn.Module):
    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, after))
        # nn.Identity where training had dropout: the numbers are part of the names
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, after), nn.SiLU(), nn.Identity(), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(hidden)
        return out


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.reshape(y.shape[0], y.shape[1], self.heads, -1).transpose(1, 2)

        if context.shape[1] == 1:  # the softmax over one token is 1: every pixel takes its value
            only: Tensor = self.to_out(self.to_v(context))
            return only
        out = F.scaled_dot_product_attention(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        joined: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return joined


class GEGLU(nn.Module):
    """Half of the channels, each times the GELU of its partner in the other half (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context, heads)
        self.ff = FeedForward(width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels as tokens, added to what came in."""

    def __init__(self, width: int, config: LDMConfig) -> None:
        super().__init__()
        heads = config.heads.of(width)
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, config.context, heads) for _ in range(config.depth)
        )
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        y = self.proj_in(self.norm(x))
        size = y.shape[2:]
        y = y.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context)
        out: Tensor = x + self.proj_out(y.transpose(1, 2).unflatten(2, size))
        return out


class Convolution(nn.Conv2d):
    """The first one: takes what every part of the UNet is given."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return super().forward(x)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class UNet(nn.Module):
    """``(sample [B,C,H,W], timestep [B] float, context [B,T,D]) -> [B,C,H,W]``."""

    def __init__(self, config: LDMConfig) -> None:
        super().__init__()
        self.base = config.base
        time, last = 4 * config.base, len(config.widths) - 1
        self.time_embed = nn.Sequential(nn.Linear(config.base, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([nn.ModuleList([Convolution(config.channels, config.base, 3, padding=1)])])
        before, kept = config.base, [config.base]
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                parts: list[nn.Module] = [ResBlock(before, width, time)]
                if level in config.attention:
                    parts.append(SpatialTransformer(width, config))
                self.input_blocks.append(nn.ModuleList(parts))
                before = width
                kept.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                kept.append(width)
        self.middle_block = nn.ModuleList(
            [ResBlock(before, before, time), SpatialTransformer(before, config), ResBlock(before, before, time)]
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(config.widths))):
            for index in range(config.blocks + 1):
                parts = [ResBlock(before + kept.pop(), width, time)]
                if level in config.attention:
                    parts.append(SpatialTransformer(width, config))
                if level and index == config.blocks:
                    parts.append(Upsample(width))
                self.output_blocks.append(nn.ModuleList(parts))
                before = width
        self.out = nn.Sequential(
            nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(config.base, config.channels, 3, padding=1)
        )

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        time = self.time_embed(timestep_features(timestep, self.base).to(sample.dtype))
        x, kept = sample, []
        for block in self.input_blocks:
            x = _through(block, x, time, context)
            kept.append(x)
        x = _through(self.middle_block, x, time, context)
        for block in self.output_blocks:
            x = _through(block, torch.cat([x, kept.pop()], dim=1), time, context)
        out: Tensor = self.out(x)
        return out


class ClassConditional(nn.Module):
    """``(sample [B,C,H,W], timestep [B] float, labels [B] int64) -> [B,C,H,W]``: the class is one token of context."""

    def __init__(self, unet: nn.Module, table: nn.Embedding) -> None:
        super().__init__()
        self.unet = unet
        self.table = table

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.unet(sample, timestep, self.table(labels)[:, None])
        return out


def embedding(rows: Tensor) -> nn.Embedding:
    """A table of these ``rows``, which is not trained."""
    return nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows, _freeze=True)


def _through(parts: nn.Module, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
    assert isinstance(parts, nn.ModuleList)
    for part in parts:
        x = part(x, time, context)
    return x
