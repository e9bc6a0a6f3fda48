"""diffusers' upsampling without the questions it asks about sizes. Imported only where a model is loaded (torch)."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

__all__ = ["without_size_limits"]


class _Nearest(nn.Module):
    """Doubles height and width, each element four times, and applies the convolution if there is one."""

    def __init__(self, conv: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: int | None = None) -> Tensor:
        if output_size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        return hidden_states if self.conv is None else self.conv(hidden_states)


def without_size_limits(model: nn.Module) -> nn.Module:
    """Replaces every ``Upsample2D``; parameters and their names stay.

    diffusers' own copies its input for batches from 64 on and for large pictures, around a fault of older CUDA kernels.
    Tracing takes those questions for limits of the model: at most 63 pictures, of less than 2^31 elements.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            plain = isinstance(child, Upsample2D) and child.norm is None and child.interpolate
            if plain and not child.use_conv_transpose and child.name == "conv":
                setattr(module, name, _Nearest(cast("nn.Module | None", child.conv)))
    return model
