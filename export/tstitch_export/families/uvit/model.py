"""U-ViT (arXiv 2209.12152): a vision transformer whose tokens are label, time and patches, with long skip connections.

Parameter names are those of the published state dicts, which load without a key map. Imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tstitch_export.families.dit.model import Attention, Mlp, PatchEmbed, timestep_features, unpatchify
from tstitch_export.families.uvit.layout import NOISE, Time, UViTConfig

__all__ = ["UViT", "network_time"]


def network_time(timestep: Tensor, time: Time) -> Tensor:
    """What the network is given for a timestep ``0 .. 999`` of its noise schedule, float32 ``[B]``.

    ``discrete``: training counts the noise levels from 1 (0 would be no noise), so the timestep plus one.

    ``continuous``: 999 t, where t in [0, 1] is the time of the VP SDE ``beta(t) = 0.1 + 19.9 t`` (arXiv 2011.13456,
    appendix B) at which it has the noise of that timestep of the linear schedule: ``0.1 t + 9.95 t^2 = L``, the
    ``L = -log abar`` there. Betas b lie ``d`` apart, so the sum of ``-log(1 - b)`` is their integral over
    ``(b - d/2, b + d/2)`` by the midpoint rule, and ``G(b) = b^2/2 + b^3/6 + b^4/12 + ...`` is that of one.
    """
    if time == "discrete":
        return timestep.float() + 1
    spec = NOISE["continuous"]
    apart = (spec.beta_end - spec.beta_start) / (spec.steps - 1)
    first = spec.beta_start - apart / 2

    def integral(beta: Tensor) -> Tensor:
        return beta * beta * (1 / 2 + beta * (1 / 6 + beta * (1 / 12 + beta / 20)))

    last = first + apart * (timestep.float() + 1)
    signal = (integral(last) - integral(torch.full_like(last, first))) / apart
    return 999 * (torch.sqrt(0.01 + 4 * 9.95 * signal) - 0.1) / (2 * 9.95)


class Block(nn.Module):
    """A transformer block with the norms first; ``skip`` ones start by joining the tokens of a shallow block."""

    def __init__(self, config: UViTConfig, *, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads, qkv_bias=config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), gelu="none")
        self.skip_linear = nn.Linear(2 * config.width, config.width) if skip else None

    def forward(self, x: Tensor, shallow: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and shallow is not None:
            x = self.skip_linear(torch.cat([x, shallow], dim=2))
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class UViT(nn.Module):
    """``(sample [B,C,H,W], timestep [B] float, labels [B] int64) -> [B,C,H,W]``.

    The timestep is one of the noise schedule ``NOISE[time]``, 0 .. 999 and fractions.
    """

    def __init__(self, config: UViTConfig, time: Time) -> None:
        super().__init__()
        self.config = config
        self.time = time
        width, half = config.width, config.depth // 2
        self.patch_embed = PatchEmbed(config.channels, width, config.patch)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if config.mlp_time
            else nn.Identity()
        )
        self.label_emb = nn.Embedding(config.labels, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + config.grid**2, width))
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch**2 * config.channels)
        self.final_layer = nn.Conv2d(config.channels, config.channels, 3, padding=1) if config.conv else nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        patches = self.patch_embed(sample)
        features = timestep_features(network_time(timestep, self.time), config.width)
        time = self.time_embed(features.to(patches.dtype))
        x = torch.cat([self.label_emb(labels)[:, None], time[:, None], patches], dim=1) + self.pos_embed
        shallow = []
        for block in self.in_blocks:
            x = block(x)
            shallow.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, shallow.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        out: Tensor = self.final_layer(unpatchify(x, config.grid, config.patch, config.channels))
        return out
