"""Overlapping tiles of one size over a plane, and their sum by weights that fade over the overlaps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blend", "Tiles", "tiles_of"]


@dataclass(frozen=True)
class Tiles:
    """Tiles of ``height x width`` that start at ``rows`` and ``columns``. All are whole: the last ends at the edge."""

    height: int
    width: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((y, x) for y in self.rows for x in self.columns)


def tiles_of(size: tuple[int, int], tile: tuple[int, int], *, overlap: float = 0.25) -> Tiles:
    """The fewest tiles that cover ``size``, where each overlaps the next by at least ``overlap`` of its side."""
    height, width = min(tile[0], size[0]), min(tile[1], size[1])
    return Tiles(height, width, _starts(size[0], height, overlap), _starts(size[1], width, overlap))


def _starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    if tile >= length:
        return (0,)
    step = max(1, tile - max(1, round(tile * overlap)))
    count = 1 + -(-(length - tile) // step)
    return tuple(round(index * (length - tile) / (count - 1)) for index in range(count))


class Blend:
    """Sums tiles ``[N,C,f*h,f*w]`` into ``[N,C,f*H,f*W]``; ``factor`` f: what comes out per element of the plane."""

    def __init__(self, tiles: Tiles, size: tuple[int, int], *, factor: int) -> None:
        self._tiles = tiles
        self._factor = factor
        self._size = (size[0] * factor, size[1] * factor)
        self._sum: NDArray[np.float32] | None = None
        self._weights = (
            _weights(tiles.rows, tiles.height, factor),
            _weights(tiles.columns, tiles.width, factor),
        )

    def add(self, place: tuple[int, int], tile: NDArray[np.float32]) -> None:
        if self._sum is None:
            self._sum = np.zeros((*tile.shape[:2], *self._size), np.float32)
        f, (y, x) = self._factor, place
        weight = np.outer(self._weights[0][y], self._weights[1][x])
        self._sum[:, :, f * y : f * y + tile.shape[2], f * x : f * x + tile.shape[3]] += tile * weight

    def result(self) -> NDArray[np.float32]:
        assert self._sum is not None, "no tile was added"
        return self._sum


def _weights(starts: tuple[int, ...], tile: int, factor: int) -> dict[int, NDArray[np.float32]]:
    """By start the weight of each of a tile's ``factor * tile`` positions; they add up to 1 everywhere.

    A tile fades in over its overlap with the one before and out over that with the one behind, in a straight line.
    """
    length = factor * tile
    at = np.arange(length) + 0.5
    raw = {}
    for index, start in enumerate(starts):
        fade = np.ones(length)
        before = starts[index - 1] + tile - start if index else 0
        behind = start + tile - starts[index + 1] if index + 1 < len(starts) else 0
        if before:
            fade = np.minimum(fade, at / (factor * before))
        if behind:
            fade = np.minimum(fade, (length - at) / (factor * behind))
        raw[start] = fade
    total = np.zeros(factor * (starts[-1] + tile))
    for start, fade in raw.items():
        total[factor * start : factor * start + length] += fade
    return {
        start: (fade / total[factor * start : factor * start + length]).astype(np.float32)
        for start, fade in raw.items()
    }
