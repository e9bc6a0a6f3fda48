"""The shape of a DiT, without torch: what a checkpoint's tensors say about the model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED_HEADS", "DiTConfig"]

# Width -> attention heads of the published models (arXiv 2212.09748, table 1): the head count leaves no trace in the
# tensor shapes, so it is read from the width where the width is one of the published ones.
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Depth, width and interface of one DiT; ``size`` is the side of the square latent in latent pixels."""

    depth: int
    width: int
    heads: int
    patch: int
    size: int
    channels: int
    classes: int
    learn_sigma: bool = False
    null_class: bool = True
    mlp_ratio: float = 4.0

    @property
    def grid(self) -> int:
        return self.size // self.patch

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)
