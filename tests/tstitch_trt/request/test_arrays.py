"""Pictures and masks given as arrays: only what can mean one thing is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tstitch_engines.errors import BadInput
from tstitch_trt.request.arrays import read_control, read_image, read_masks

DEPTH = np.full((4, 4, 3), 40_000, np.uint16)


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (DEPTH, "255 * (x / 65535)"), (DEPTH.astype(np.int32), "255 * (x / 65535)"),
        (np.ones((4, 4, 3), np.float32), "255 * (x / 1)"), (Image.fromarray(DEPTH[..., 0]), "255 * (x / 65535)"),
    ],
)  # fmt: skip
def test_levels_of_another_range_say_how_to_scale_them(array: Any, hint: str) -> None:
    for reader in (lambda given: read_image(given, 3), read_control):
        with pytest.raises(BadInput) as caught:
            reader(array)
        assert hint in caught.value.hint


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_a_pil_image_of_other_colours_is_not_taken_for_red_green_and_blue(mode: str) -> None:
    image = Image.new("RGB", (4, 4)).convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4))
    for reader in (lambda given: read_image(given, 3), read_control, lambda given: read_masks(given, size=(4, 4))):
        with pytest.raises(BadInput, match=f"PIL image of mode '{mode}'"):
            reader(image)


@pytest.mark.parametrize("values", [(0.0, 255.0), (-0.1, 1.0)])
def test_masks_are_of_one_range(values: tuple[float, float]) -> None:
    with pytest.raises(BadInput, match="allowed are those from 0 to 1"):
        read_masks(np.array([values], np.float32), size=(1, 2))
    with pytest.raises(BadInput, match="uint16"):
        read_masks(np.array([[0, 300]], np.uint16), size=(1, 2))
