"""Tiles: they cover everything, overlap enough, and add up to what they were cut from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tstitch_trt.runtime.tiling import Blend, tiles_of

SIDES = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(SIDES, SIDES, st.integers(1, 4))
def test_tiles_of_a_plane_add_up_to_it(size: tuple[int, int], tile: tuple[int, int], factor: int) -> None:
    tiles = tiles_of(size, tile)
    plane = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
    enlarged = plane.repeat(factor, 2).repeat(factor, 3)
    blend = Blend(tiles, size, factor=factor)
    for y, x in tiles:
        assert 0 <= y <= size[0] - tiles.height
        assert 0 <= x <= size[1] - tiles.width
        part = plane[:, :, y : y + tiles.height, x : x + tiles.width]
        blend.add((y, x), part.repeat(factor, 2).repeat(factor, 3))
    assert np.abs(blend.result() - enlarged).max() < 1e-5


@given(st.integers(2, 200), st.integers(8, 64))
def test_neighbours_overlap_by_a_quarter_at_least(length: int, tile: int) -> None:
    tiles = tiles_of((length, 1), (tile, 1))
    for before, after in zip(tiles.rows, tiles.rows[1:], strict=False):
        assert before < after
        assert before + tiles.height - after >= round(tile / 4)
    assert tiles.rows[-1] + tiles.height == length


def test_a_plane_that_fits_is_one_tile() -> None:
    tiles = tiles_of((64, 48), (64, 64))
    assert (tiles.height, tiles.width, list(tiles)) == (64, 48, [(0, 0)])


def test_overlaps_fade_in_a_straight_line() -> None:
    """Two tiles of zeros and ones: between them a ramp, as diffusers' ``blend_v`` makes one."""
    tiles = tiles_of((1, 14), (1, 8))
    assert tiles.columns == (0, 6)
    blend = Blend(tiles, (1, 14), factor=4)
    blend.add((0, 0), np.zeros((1, 1, 4, 32), np.float32))
    blend.add((0, 6), np.ones((1, 1, 4, 32), np.float32))
    row = blend.result()[0, 0, 0]
    assert row[:24].max() == 0
    assert row[32:].min() == pytest.approx(1)
    assert row[24:32] == pytest.approx((np.arange(8) + 0.5) / 8, abs=1e-6)
