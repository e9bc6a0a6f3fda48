"""Ranges of image sizes in pixels become ranges of the latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tstitch_engines.bundle.manifest import Latent
from tstitch_engines.errors import BadInput
from tstitch_engines.spec import Range

__all__ = ["SizeRanges", "in_latents", "sizes_of"]


@dataclass(frozen=True, kw_only=True)
class SizeRanges:
    """Ranges of the engines' dimensions; ``height`` and ``width`` are of the latent. Without ``tokens`` the model's."""

    batch: Range
    height: Range
    width: Range
    tokens: Range | None = None


def sizes_of(
    networks: Sequence[tuple[str, bool]],
    latent: Latent,
    factor: int,
    *,
    batch: Range,
    height: Range | None,
    width: Range | None,
    tokens: Range | None,
) -> SizeRanges:
    """The sizes that all networks are built for. ``networks``: their names, and whether their sizes are dynamic.

    ``height`` and ``width`` are in pixels, ``factor`` of them per latent element; ``None``: those of ``latent``. Raises
    ``BadInput`` for sizes that are no multiple of ``factor`` or that a member can't have.
    """
    found: dict[str, Range] = {}
    for side, asked, native in (("height", height, latent.height), ("width", width, latent.width)):
        chosen = in_latents(asked, factor, side)
        found[side] = Range(native, native, native) if chosen is None else chosen
        fixed = next((what for what, dynamic in networks if not dynamic), None)
        if fixed is not None and found[side] != Range(native, native, native):
            raise BadInput(
                f"{side} {asked} was asked for, and {fixed} takes {native * factor} pixels alone",
                hint=f"leave out --{side}",
            )
    return SizeRanges(batch=batch, height=found["height"], width=found["width"], tokens=tokens)


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
