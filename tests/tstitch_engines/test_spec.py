"""Dimensions that depend on named sizes."""

from __future__ import annotations

import pytest

from tstitch_engines.errors import BadInput
from tstitch_engines.spec import Range, TensorSpec


def test_multiples_and_parts_of_a_named_size() -> None:
    spec = TensorSpec(name="x", dtype="float16", shape=("B", 3, "8*H", "W/8"))
    assert spec.resolve({"B": 2, "H": 5, "W": 17}) == (2, 3, 40, 3)  # a part is rounded up, as strided convolutions do
    assert spec.nbytes({"B": 2, "H": 5, "W": 17}) == 2 * 3 * 40 * 3 * 2
    assert spec.dims == {"B", "H", "W"}


@pytest.mark.parametrize("size", ["8", "H*8", "H-1", "8*", "", "H/"])
def test_other_expressions_are_refused(size: str) -> None:
    with pytest.raises(BadInput, match="allowed are a size, NAME"):
        TensorSpec(name="x", dtype="float32", shape=("B", size))


@pytest.mark.parametrize("text", ["1:8:" + "9" * 5000, "1:8:16777217", "\u00b2", "1:8:16:32", "", "-1"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="profile"):
        Range.parse(text)
