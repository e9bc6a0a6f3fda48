"""diffusers' UNets behind a class table. Imports torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["ClassConditional", "embedding", "skip_lone_softmax"]


class ClassConditional(nn.Module):
    """``(sample [B,C,H,W], timestep [B] float, labels [B] int64) -> [B,C,H,W]``: the class is one token of context."""

    def __init__(self, unet: nn.Module, table: nn.Embedding) -> None:
        super().__init__()
        self.unet = unet
        self.table = table

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.unet(sample, timestep, self.table(labels)[:, None])
        return out


class _LoneToken:
    """Cross-attention to one token: the softmax over it is 1, so every pixel takes its value."""

    def __call__(self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        value: Tensor = attention.to_out[0](attention.to_v(encoder_hidden_states))
        return value.expand(-1, hidden_states.shape[1], -1)


def skip_lone_softmax(unet: Any) -> None:
    """Makes the cross-attention of a ``UNet2DConditionModel`` take its one token of context without a softmax."""
    own = unet.attn_processors
    unet.set_attn_processor({name: _LoneToken() if ".attn2." in name else used for name, used in own.items()})


def embedding(rows: Tensor) -> nn.Embedding:
    """A table of these ``rows``, which is not trained."""
    return nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows, _freeze=True)
