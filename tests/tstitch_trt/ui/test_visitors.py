"""Who may draw: one drawing a page, a bound for each address, and closed pages lose their place."""

from __future__ import annotations

import time

import pytest

from tstitch_engines.errors import Busy, Cancelled
from tstitch_trt.ui.visitors import Bucket, Drawings


def test_a_page_draws_once_at_a_time() -> None:
    drawings = Drawings(100)
    with drawings.drawing("page", "1", 8):
        with pytest.raises(Busy, match="draws already"), drawings.drawing("page", "2", 1):
            pass
        with drawings.drawing("other", "1", 8):
            assert len(drawings) == 2
    with drawings.drawing("page", "1", 8):
        assert len(drawings) == 1
    assert len(drawings) == 0


def test_an_address_has_its_bound() -> None:
    drawings = Drawings(10)
    with (
        drawings.drawing("a", "1", 4), drawings.drawing("b", "1", 4), drawings.drawing("c", "2", 10),
    ):  # fmt: skip
        words = "8 pictures of this address are being drawn, 3 more are too many; allowed are 10"
        with pytest.raises(Busy, match=words), drawings.drawing("d", "1", 3):
            pass
        with drawings.drawing("d", "1", 2):
            pass


def test_a_closed_page_loses_its_place() -> None:
    drawings = Drawings(10, grace=0.2)
    with drawings.drawing("page", "1", 10) as mine:
        mine.check()  # it may still come
        with drawings.visitors.listening("page"):
            time.sleep(0.25)
            mine.check()
        mine.check()  # it may come back
        time.sleep(0.25)
        with pytest.raises(Cancelled, match="page was closed"):
            mine.check()
        with drawings.drawing("next", "1", 10):
            pass


def test_a_bucket_forgets_addresses() -> None:
    bucket = Bucket(2, 1000)
    assert [bucket.take("a") for _ in range(2)] == [True, True]
    for index in range(5000):
        bucket.take(str(index))
    assert len(bucket._left) <= 4097
