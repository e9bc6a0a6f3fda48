"""``tstitch-trt cache``: what is there, what goes, and that builds still work afterwards."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from support.command import Command, refused
from tstitch_engines.bundle.cache import Cache
from tstitch_export.build import build


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    return Command(capfd)


def age(days: float) -> None:
    when = time.time() - 86400 * days
    for record in Cache().root.rglob("entry.json"):
        os.utime(record, (when, when))


def test_a_build_is_listed_with_its_time_and_pruned_by_age(run: Command, tmp_path: Path) -> None:
    output = tmp_path / "fashion.bundle"
    first = build("fashion", output=output)
    said = run("cache", "list", "--json").json
    assert {entry["what"] for entry in said["entries"]} == {
        "member small: onnxruntime engine",
        "member large: onnxruntime engine",
    }
    assert all(entry["seconds"] > 0 for entry in said["entries"])
    on_disk = sum(path.stat().st_size for path in Cache().root.rglob("*") if path.name.startswith("onnxruntime-"))
    assert said["bytes"] == on_disk > 0
    table = run("cache")
    assert "member large: onnxruntime engine" in table.out
    assert "2 entries" in table.out
    age(40)
    assert "40 d ago" in run("cache", "list").out
    assert run("cache", "prune", "--older-than", "41d", "--json").json == {"removed": [], "bytes": 0}
    removed = run("cache", "prune", "--older-than", "30d")
    assert removed.code == 0
    assert "2 entries removed" in removed.out
    assert run("cache", "list", "--json").json["entries"] == []
    # nothing depends on it
    assert build("fashion", output=output) == first
    assert build("fashion", output=tmp_path / "again.bundle") == first


def test_prune_by_size_and_clear(run: Command, tmp_path: Path) -> None:
    build("fashion", output=tmp_path / "fashion.bundle")
    pruned = run("cache", "prune", "--max-size", "2MB", "--json").json
    assert [entry["what"] for entry in pruned["removed"]] == ["member large: onnxruntime engine"]
    cleared = run("cache", "clear", "--json").json
    assert [entry["what"] for entry in cleared["removed"]] == ["member small: onnxruntime engine"]
    assert json.loads(run("cache", "clear", "--json").out) == {"removed": [], "bytes": 0}
    assert "0 entries" in run("cache", "list").out


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("cache prune", ("--max-size or --older-than", "got neither", "cache clear")),
        ("cache prune --max-size 20", ("'20'", "GB", "--max-size 20GB")),
        ("cache prune --max-size big", ("'big'", "GiB")),
        ("cache prune --older-than 30", ("'30'", "min, h, d or w", "--older-than 30d")),
        ("cache prune --older-than 30y", ("'30y'", "--older-than 30d")),
        ("cache drop", ("'drop'", "tstitch-trt cache --help")),
        ("cache list --max-size 1GB", ("'--max-size'", "tstitch-trt cache list --help")),
    ],
)
def test_bad_input_is_refused_with_a_hint(run: Command, line: str, parts: tuple[str, ...]) -> None:
    refused(run(*line.split()), *parts)
