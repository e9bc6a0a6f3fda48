"""An export runs in a child process: beyond its limits it ends, or does not start, and nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.tiny import TinyPair
from tstitch_engines.errors import FailedWork, OutOfMemory, OutOfTime
from tstitch_export.build import build


@pytest.mark.parametrize(
    ("limit", "kind", "words", "option"),
    [
        ({"memory_limit": "10kB"}, OutOfMemory, "exporting member small needs .*KiB .*its limit is", "--memory-limit"),
        (
            {"time_limit": 0.1},
            OutOfTime,
            r"exporting member small took longer than its limit of 0\.1 s",
            "--time-limit",
        ),
    ],
)
def test_an_export_is_limited(
    tiny_pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: dict[str, Any],
    kind: type[FailedWork],
    words: str,
    option: str,
) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(kind, match=words) as caught:
        build(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            output=tmp_path / "a.bundle",
            **limit,
        )
    assert option in caught.value.hint
    assert not (tmp_path / "a.bundle").exists()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []
