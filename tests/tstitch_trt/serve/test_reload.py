"""Reloads that meet: none is lost, and none is done twice."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tstitch_engines.errors import Busy
from tstitch_trt.serve.reload import Reloader

SECONDS = 30


class Engine:
    """Takes a bundle when it is let."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.replaced: list[str] = []

    def replace(self, model: str, bundle: Path) -> None:
        self.begun.release()
        assert self.go_on.acquire(timeout=SECONDS)
        self.replaced.append((bundle / "manifest.json").read_text())


def test_what_changes_during_a_reload_is_in_the_one_that_follows(tmp_path: Path) -> None:
    engine: Any = Engine()
    manifest = tmp_path / "manifest.json"
    manifest.write_text("1")
    reload = Reloader(engine, {"tiny": tmp_path})
    with ThreadPoolExecutor(2) as pool:
        manifest.write_text("2")
        first = pool.submit(reload)
        assert engine.begun.acquire(timeout=SECONDS)
        manifest.write_text("3")
        with pytest.raises(Busy, match="reloaded already"):
            reload()
        following = pool.submit(reload, wait=True)
        while not reload._waiting.locked():
            assert not following.done()
        assert [reload(wait=True) for _ in range(3)] == [()] * 3, "the one that waits sees their changes too"
        engine.go_on.release()
        assert first.result(SECONDS) == ("tiny",)
        engine.go_on.release()
        assert following.result(SECONDS) == ("tiny",)
    assert engine.replaced == ["3", "3"]
    assert reload() == ()
