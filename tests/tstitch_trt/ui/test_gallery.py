"""The table of one drawing: what stands above its columns, and which speed-up it may state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from tstitch_trt.ui.drawing import Column
from tstitch_trt.ui.gallery import Gallery, Predicted


def column(fraction: float, ms: float | None, **fields: Any) -> Column:
    return Column(fraction, f"{fraction:.0%} of small", 10, ms=ms, **fields)


def gallery(*columns: Column, **fields: Any) -> Gallery:
    return Gallery(list(columns), range(7, 9), "Bag", ("small", "large"), Path("pictures"), **fields)


def test_the_speed_up_is_measured_against_the_last_member_alone() -> None:
    html = gallery(column(0, 90.0), column(0.4, 60.0), column(1, 9.0)).html()
    assert "1.50× as fast<" in html
    assert "10.00× as fast<" in html
    assert html.count("as fast") == 2
    assert "against large alone (0%), measured in this drawing" in html


def test_without_it_the_speed_up_is_predicted_or_none() -> None:
    some = (column(0.4, 61.0), column(1, 9.0))
    predicted = gallery(*some, predicted=Predicted([60.0, 10.0], 90.0, "2024-01-02 03:04 UTC")).html()
    assert "1.50× as fast, predicted" in predicted
    assert "9.00× as fast, predicted" in predicted
    assert "predicted by the calibration of 2024-01-02 03:04 UTC" in predicted
    plain = gallery(*some).html()
    assert "as fast" not in plain
    assert "Tick 0% to measure" in plain


def test_times_of_shared_batches_make_no_speed_up() -> None:
    for columns in ((column(0, 90.0, shared=True), column(1, 9.0)), (column(0, 90.0), column(1, 9.0, shared=True))):
        html = gallery(*columns).html()
        assert "as fast" not in html
        assert "Another request was drawn at the same time" in html
        assert "90.0 ms per image" in html


def test_columns_and_rows_have_their_place_before_they_are_drawn(tmp_path: Path) -> None:
    drawing = gallery(column(0, None, words="3 of 10 steps", done=3), column(1, None))
    drawing.folder = tmp_path
    assert drawing.html().count('class="empty"') == 4
    assert 'value="3" max="20"' in drawing.status()
    assert "0%: 3 of 10 steps" in drawing.status()
    asyncio.run(drawing.put(1, column(1, 9.0), {1: np.zeros((28, 28, 1), np.uint8)}))
    html = drawing.html()
    assert html.count('class="empty"') == 3
    assert 'alt="Bag, seed 8, 100% of the steps on small" class="small"' in html
    asyncio.run(drawing.put(0, column(0, 90.0), {0: np.zeros((512, 512, 3), np.uint8)}))
    assert 'class="small"' not in drawing.html()  # large pictures are smoothed
    assert "Rows: seeds" in drawing.status()
