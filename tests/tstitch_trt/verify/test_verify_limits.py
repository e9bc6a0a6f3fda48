"""Bundles from strangers whose graphs never end or take all memory when they run: ``verify`` ends in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from support.absurd_graphs import endless, growing
from support.hand_made import text_bundle
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import OutOfMemory, OutOfTime
from tstitch_trt.verify.verify import verify


@pytest.fixture(scope="module")
def forever(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return text_bundle(tmp_path_factory.mktemp("forever") / "forever.bundle", {"small": endless()})


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary files go to."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "temporary"


def test_an_engine_that_never_ends(forever: Bundle, temporary: Path) -> None:
    started = time.monotonic()
    with pytest.raises(OutOfTime, match=r"verifies forever\.bundle took longer than its limit of 1 s"):
        verify(forever, samples=1, time_limit=1.0)
    assert time.monotonic() - started < 60
    assert list(temporary.iterdir()) == []


def test_an_engine_that_takes_all_memory(tmp_path: Path) -> None:
    bundle = text_bundle(tmp_path / "huge.bundle", {"small": growing(elements=500_000_000)})
    with pytest.raises(OutOfMemory, match=r"verifies huge\.bundle ran out of memory: .*its limit is 1\.0 GiB"):
        verify(bundle, samples=1, memory_limit="1GiB")


@pytest.mark.parametrize("number", [signal.SIGINT, None])
def test_the_command_ends_at_its_limit_and_when_it_is_stopped(
    forever: Bundle, temporary: Path, number: signal.Signals | None
) -> None:
    limit = "1" if number is None else "5m"
    words = [sys.executable, "-m", "tstitch_trt.cli", "verify", str(forever.root), "--time-limit", limit]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}) as command:
        child = _child_of(command.pid)
        if number is not None:
            command.send_signal(number)
        _, said = command.communicate(timeout=60)
    assert command.returncode == (1 if number is None else 128 + number), said
    assert (b"--time-limit" in said) == (number is None)
    assert b"Traceback" not in said
    deadline = time.monotonic() + 30
    while _alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list(temporary.iterdir()) == []


def _child_of(parent: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            for pid in task.read_text().split():
                if b"tstitch_engines.child.serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        time.sleep(0.01)
    raise AssertionError("no child was started")


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
