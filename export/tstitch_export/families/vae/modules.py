"""diffusers' autoencoders behind the signatures of ``vae_decoder`` and ``vae_encoder``. Imports torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decode", "Encode"]


class Decode(nn.Module):
    """latent ``[B,C,H,W]`` in the diffusion model's scaling -> image float32 ``[B,3,f*H,f*W]``, about [-1, 1]."""

    def __init__(self, model: Any, *, kind: str, scaling: float, shift: float) -> None:
        super().__init__()
        self.kind, self.scaling, self.shift = kind, scaling, shift
        self.decoder: nn.Module = model.decoder
        self.post_quant_conv: nn.Module | None = None if kind == "tiny" else model.post_quant_conv
        if kind == "vq":
            self.codebook = nn.Parameter(model.quantize.embedding.weight.detach(), requires_grad=False)

    def forward(self, latent: Tensor) -> Tensor:
        z = latent / self.scaling
        if self.shift:
            z = z + self.shift
        if self.kind == "vq":
            z = nearest_entries(z, self.codebook)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        image: Tensor = self.decoder(z)
        return image.float()


class Encode(nn.Module):
    """image ``[B,3,f*H,f*W]`` in [-1, 1] -> mean and std float32 ``[B,C,H,W]`` in the diffusion model's scaling.

    std is 0 where the encoder gives one latent and no distribution.
    """

    def __init__(self, model: Any, *, kind: str, scaling: float, shift: float) -> None:
        super().__init__()
        self.kind, self.scaling, self.shift = kind, scaling, shift
        self.encoder: nn.Module = model.encoder
        self.quant_conv: nn.Module | None = None if kind == "tiny" else model.quant_conv

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(image)
        if self.quant_conv is not None:
            z = self.quant_conv(z)
        z = z.float()
        if self.kind != "kl":
            return (z - self.shift) * self.scaling, torch.zeros_like(z)
        mean, log_variance = z.chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # the bounds of latent diffusion's own code
        return (mean - self.shift) * self.scaling, std * self.scaling


def nearest_entries(z_BCHW: Tensor, codebook_NC: Tensor) -> Tensor:
    """Each position replaced by its nearest codebook entry: the least |e|^2 - 2 z.e."""
    z = z_BCHW.permute(0, 2, 3, 1)
    distances = codebook_NC.square().sum(1) - 2.0 * (z @ codebook_NC.T)
    return codebook_NC[distances.argmin(-1)].permute(0, 3, 1, 2)
