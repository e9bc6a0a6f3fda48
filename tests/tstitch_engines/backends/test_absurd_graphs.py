"""Graphs from strangers that take for ever or any memory to compile: an error in time, and nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.absurd_graphs import large_to_fold, slow_to_fold
from support.hand_made import Made, text_bundle
from tstitch_engines.child import Limits
from tstitch_engines.errors import FailedWork, OutOfMemory, OutOfTime


@pytest.mark.parametrize(
    ("make", "limits", "kind", "words"),
    [
        (slow_to_fold, Limits(time=1.0), OutOfTime, r"compiling model\.onnx with onnxruntime took longer than .* 1 s"),
        (large_to_fold, Limits(memory=700 << 20), OutOfMemory, r"ran out of memory: .*its limit is 700\.0 MiB"),
    ],
)
def test_constant_folding_is_limited(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Made],
    limits: Limits,
    kind: type[FailedWork],
    words: str,
) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    started = time.monotonic()
    with pytest.raises(kind, match=words):
        text_bundle(tmp_path / "a.bundle", {"small": make()}, limits=limits)
    assert time.monotonic() - started < 30
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []
