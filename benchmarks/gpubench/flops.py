"""Work of one DiT call by formula.

A multiplication and an addition count as two operations. Per picture with T tokens, width D, depth L and an MLP of
four times the width (arXiv 2212.09748, whose table 1 counts a multiply-add once, i.e. half of this):

    block      24 T D^2 (qkv 6, projection 2, MLP 16) + 4 T^2 D (scores, weighted sum) + 12 D^2 (adaLN, not per token)
    embedding  2 T (p^2 C) D + 2 (256 D + D^2)
    final      2 T D (p^2 C_out) + 4 D^2

Norms, softmax, GELU and additions are left out: they are below one percent. Bytes are the least that must move: every
weight once per call, the inputs once, the output once. Activations between layers are not counted, so the GB/s made
from them are a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpubench.cases import MODELS

__all__ = ["Work", "dit_work"]

CHANNELS, OUT_CHANNELS, LABELS = 4, 8, 1001
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Work:
    """``flops`` per picture; ``parameters`` of the model; ``latent``: elements of one picture's latent."""

    flops: float
    parameters: int
    latent: int

    def bytes(self, rows: int, precision: str) -> int:
        """Least bytes of one call on ``rows`` pictures (guidance makes two rows of one image)."""
        return _BYTES[precision] * (self.parameters + rows * 3 * self.latent)  # one latent in, two out


def dit_work(model: str, pixels: int) -> Work:
    depth, width, _, patch = MODELS[model]
    side = pixels // 8
    tokens = (side // patch) ** 2
    block = 24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2
    patch_in, patch_out = patch**2 * CHANNELS, patch**2 * OUT_CHANNELS
    embedding = 2 * tokens * patch_in * width + 2 * (256 * width + width**2)
    final = 2 * tokens * width * patch_out + 4 * width**2
    parameters = (
        depth * (18 * width**2 + 15 * width)  # with biases: 4 + 8 + 6 squares, 3 + 1 + 4 + 1 + 6 vectors
        + (patch_in + 1) * width
        + (256 + 1) * width + (width + 1) * width
        + LABELS * width
        + (width + 1) * patch_out + (width + 1) * 2 * width
    )  # fmt: skip
    return Work(depth * block + embedding + final, parameters, CHANNELS * side**2)
