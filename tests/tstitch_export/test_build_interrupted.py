"""A build that is stopped, killed or runs out of room leaves the old bundle as it was, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.spec import Range
from tstitch_export.build import build

# Waits where a build is in the middle: files are in the bundle's temporary directory and an engine is being compiled.
WAITING = """
import sys, time
from pathlib import Path
from tstitch_engines.spec import Range
from tstitch_export.build import build
def progress(phase, share):
    if phase.startswith("large: compile"):
        print("ready", flush=True)
        time.sleep(600)
build("fashion", output=Path(sys.argv[1]), profile=Range(1, 2, 2), progress=progress)
"""

NO_ROOM = """
import resource, sys
from pathlib import Path
from tstitch_engines.errors import BuildFailed
from tstitch_engines.spec import Range
from tstitch_export.build import build
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    build("fashion", output=Path(sys.argv[1]), profile=Range(1, 2, 2), backend=sys.argv[3])
except BuildFailed as error:
    print(error)
    raise SystemExit(7)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("original") / "fashion.bundle"
    build("fashion", output=output)
    return output


@pytest.fixture
def old(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "fashion.bundle")
    return tmp_path / "fashion.bundle"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(bundle: Path) -> set[str]:
    return {path.name for path in bundle.parent.iterdir()} - {bundle.name, "cache"}


@pytest.fixture
def child(old: Path, cache: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", WAITING, str(old)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(beside(old)) == 1, "the bundle in the making is a sibling"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped(child: subprocess.Popen[str], old: Path, original: Path, cache: Path, number: signal.Signals) -> None:
    child.send_signal(number)
    while number == signal.SIGTERM and child.poll() is None:  # again and again, while it tidies up
        child.send_signal(number)
        time.sleep(0.001)
    child.wait(60)
    assert child.returncode != 0
    assert contents(old) == contents(original)
    assert not beside(old)
    assert not list(cache.rglob("building-*")), "nor is anything half-written in the cache"


def test_killed(child: subprocess.Popen[str], old: Path, original: Path) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    assert contents(old) == contents(original)
    open_bundle(old)
    assert beside(old), "a killed process can't tidy up"
    finished = build("fashion", output=old, profile=Range(1, 2, 2))
    assert not beside(old), "the next build does"
    assert open_bundle(old).manifest == finished


def test_first_build_killed_is_no_bundle(tmp_path: Path, cache: Path) -> None:
    output = tmp_path / "fashion.bundle"
    process = subprocess.Popen([sys.executable, "-c", WAITING, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
    assert not output.exists()
    build("fashion", output=output)
    open_bundle(output)


# 20 kB: not even the graph; 600 kB: not small's engine; 5 MB: not large's weights; 10 MB: not large's engine
@pytest.mark.parametrize("limit", [20_000, 600_000, 5_000_000, 10_000_000])
def test_full_disk(old: Path, original: Path, cache: Path, limit: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(old), str(limit), "onnxruntime"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 7, child.stderr
    assert "hint: free space there" in child.stdout
    assert contents(old) == contents(original)
    assert not beside(old)
    assert not list(cache.rglob("building-*"))
    if limit == 5_000_000:  # between the members: with room again the same build goes through
        build("fashion", output=old, profile=Range(1, 2, 2))
        open_bundle(old)


def test_full_disk_with_torch(old: Path, original: Path, cache: Path) -> None:
    """PyTorch's own file writer would end the process here."""
    child = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(old), "1000000", "torch"], capture_output=True, text=True, check=False
    )
    assert child.returncode == 7, child.stderr
    assert contents(old) == contents(original)
    assert not beside(old)


def test_no_rights(old: Path, original: Path, cache: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    from tstitch_engines.errors import BuildFailed

    old.parent.chmod(0o500)
    try:
        with pytest.raises(BuildFailed, match="Permission denied"):
            build("fashion", output=old, profile=Range(1, 2, 2))
    finally:
        old.parent.chmod(0o700)
    assert contents(old) == contents(original)
