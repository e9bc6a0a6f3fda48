"""Ranges of image sizes in pixels become ranges of the latent."""

from __future__ import annotations

from dataclasses import dataclass

from tstitch_engines.errors import BadInput
from tstitch_engines.spec import Range, usual_batch

__all__ = ["SizeRanges", "in_latents"]


@dataclass(frozen=True, kw_only=True)
class SizeRanges:
    """Ranges of the engines' dimensions; ``height`` and ``width`` are of the latent. Without ``tokens`` the model's.

    ``batch``: ``None`` for the usual one, which for networks that run both halves of guidance (``guided``) is another.
    """

    batch: Range | None
    guided: bool
    height: Range
    width: Range
    tokens: Range | None = None

    def rows(self, *, distilled: bool = False) -> Range:
        """Batch sizes of a network; ``distilled``: it takes the guidance scale as an input and runs one half."""
        return self.batch or usual_batch(guided=self.guided and not distilled)


def in_latents(pixels: Range | None, factor: int, side: str) -> Range | None:
    """A range of pixels as latent elements. Raises ``BadInput`` for one that is no multiple of ``factor``."""
    if pixels is None:
        return None
    for size in (pixels.min, pixels.opt, pixels.max):
        if size % factor:
            raise BadInput(
                f"{side} {pixels}: {size} is not a multiple of {factor} pixels, one latent element",
                hint=f"e.g. {size // factor * factor or factor} or {-(-size // factor) * factor}",
            )
    return Range(pixels.min // factor, pixels.opt // factor, pixels.max // factor)
