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

from gpubench.cases import MODELS, DitCase

__all__ = ["Work", "contender_seconds", "dit_work"]

CHANNELS, OUT_CHANNELS, LABELS = 4, 8, 1001
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_ASSUMED_RATE = 250e12  # operations a second in half precision that any contender should reach on an H100: a guess


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


def contender_seconds(case: DitCase, rounds: int) -> float:
    """About how long the longest contender, which is ours, computes: two walks of each plan before the rounds, and
    in every round as many bare calls as steps. Building and compiling are not in it."""
    small, large = (dit_work(model, case.pixels).flops for model in (case.small, case.large))
    steps = case.steps * 2 * case.batch * sum(f * small + (1 - f) * large for f in case.fractions)
    return steps * (2 + rounds + 1 + rounds) / _ASSUMED_RATE
