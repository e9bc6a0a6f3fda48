"""Engines from the cache or the bundle that is replaced: those that would be made otherwise now are not among them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.compile import engine
from tstitch_engines.spec import Range
from tstitch_export.build import build


def test_what_an_earlier_version_compiled_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "tstitch_engines")

    def reused(name: str) -> int:
        caplog.clear()
        build("fashion", output=tmp_path / name, profile=Range(1, 1, 2))
        return caplog.text.count("onnxruntime engine: reused from the")

    assert [reused("a.bundle"), reused("b.bundle"), reused("a.bundle")] == [0, 2, 2]
    monkeypatch.setattr(engine, "_COMPILE_SCHEMA", engine._COMPILE_SCHEMA + 1)
    assert [reused("c.bundle"), reused("d.bundle")] == [0, 2]
    monkeypatch.setattr(engine, "_COMPILE_SCHEMA", engine._COMPILE_SCHEMA + 1)
    assert reused("a.bundle") == 0, "the bundle that is replaced has them"
    assert all(len(one.engines) == 1 for one in open_bundle(tmp_path / "a.bundle").manifest.members.values())
