"""The DiT denoiser (Peebles & Xie, arXiv 2212.09748) with the parameter names of the published checkpoints.

Those checkpoints load without a key map. Imports torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tstitch_export.families.dit.config import DiTConfig

__all__ = ["Attention", "DiT", "Mlp", "PatchEmbed", "timestep_features", "unpatchify"]


def timestep_features(timestep_B: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features ``[B, width]``, cosines first, of float timesteps ``[B]``."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timestep_B.device) * (-math.log(max_period) / half)
    )
    angles = timestep_B.float()[:, None] * frequencies[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def sincos_position(width: int, grid: int) -> Tensor:
    """The fixed 2-D sine-cosine table ``[1, grid*grid, width]``: first half of the width codes the column."""
    quarter = width // 4
    omega = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    row, col = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")

    def table(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1).double() * omega[None, :]
        return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)

    return torch.cat([table(col), table(row)], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


def unpatchify(x: Tensor, grid: int, patch: int, channels: int) -> Tensor:
    """Rows of patches ``[B, grid*grid, patch*patch*channels]`` -> ``[B, channels, grid*patch, grid*patch]``."""
    x = x.unflatten(1, (grid, grid)).unflatten(3, (patch, patch, channels))  # type: ignore[no-untyped-call]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(timestep_features(t).to(next(self.mlp.parameters()).dtype))
        return out


class LabelEmbedder(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(labels)
        return out


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[2]
        # One transpose for all three: with one each, TensorRT adds the bias in three passes over the activations and
        # dequantises an 8-bit weight with a scale per channel at run time.
        qkv = self.qkv(x).unflatten(2, (3, self.heads, width // self.heads)).permute(2, 0, 3, 1, 4)  # [3, B, h, T, d]
        out: Tensor = self.proj(F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """``gelu``: ``tanh`` (DiT) or ``none`` (U-ViT, the exact function)."""

    def __init__(self, width: int, hidden: int, *, gelu: str = "tanh") -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))
        return out


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (arXiv 2212.09748, figure 3)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None, :] * self.attn(modulate(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate2[:, None, :] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiT(nn.Module):
    """``(sample [B,C,H,W], timestep [B] float, labels [B] int64) -> [B, C or 2C, H, W]``.

    The result has ``2C`` channels when ``config.learn_sigma``: the second half is the learned-range variance logit of
    Improved DDPM (arXiv 2102.09672, eq. 15). Label ``config.classes`` is the null class.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        hidden = int(config.width * config.mlp_ratio)
        self.x_embedder = PatchEmbed(config.channels, config.width, config.patch)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.classes + int(config.null_class), config.width)
        self.register_buffer("pos_embed", sincos_position(config.width, config.grid))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, hidden) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch**2 * config.out_channels)

    def initialise(self) -> DiT:
        """adaLN-Zero initialisation: every block starts as the identity (arXiv 2212.09748, section 3.2)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        return self

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        x = self.x_embedder(sample) + self.pos_embed
        c = self.t_embedder(timestep) + self.y_embedder(labels)
        for block in self.blocks:
            x = block(x, c)
        config = self.config
        return unpatchify(self.final_layer(x, c), config.grid, config.patch, config.out_channels)
