"""The process that compiles: whatever becomes of it, or of whoever waits for it, is an error and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.tensorrt_builds import compile_member, shipped_small
from tstitch_engines.backends.tensorrt import TensorRtBackend
from tstitch_engines.errors import BuildFailed, Cancelled

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")

WORKER = b"tstitch_engines.child.serve"


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The worker processes that are started, oldest first."""
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def recording(*args: Any, **rest: Any) -> subprocess.Popen[bytes]:
        started.append(real(*args, **rest))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recording)
    return started


@pytest.mark.parametrize(
    ("number", "words", "hint"),
    [
        (signal.SIGKILL, r"killed \(SIGKILL\), as the kernel does when memory runs out; it needs about", "free memory"),
        (signal.SIGSEGV, "process compiling small.onnx ended with signal SIGSEGV", "the library crashed"),
    ],
)
def test_a_worker_that_is_killed_is_an_error_that_says_how(
    rtx: TensorRtBackend,
    workers: list[subprocess.Popen[bytes]],
    tmp_path: Path,
    number: signal.Signals,
    words: str,
    hint: str,
) -> None:
    member, model = shipped_small()
    with pytest.raises(BuildFailed, match=words) as caught:
        compile_member(
            rtx, member, model, tmp_path / "a.rtx", progress=lambda phase, share: workers[0].send_signal(number)
        )
    assert hint in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_caller_that_stops_stops_the_worker(
    rtx: TensorRtBackend, workers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    def stop(phase: str, share: float) -> None:
        raise Cancelled("enough", hint="")

    member, model = shipped_small()
    with pytest.raises(Cancelled):
        compile_member(rtx, member, model, tmp_path / "a.rtx", progress=stop)
    assert workers[0].returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_breaks_the_interpreter_is_quoted(
    rtx: TensorRtBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module found before the real one ends the process: only the worker dies of it."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tensorrt_rtx.py").write_text(
        "import os, sys\nsys.stderr.write('first line\\nglibc too old\\n')\nsys.stderr.flush()\nos._exit(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    member, model = shipped_small()
    with pytest.raises(BuildFailed, match=r"ended with exit code 3: first line \| glibc too old"):
        compile_member(rtx, member, model, tmp_path / "a.rtx")
    assert not (tmp_path / "a.rtx").exists()


def test_a_full_disk_is_named(rtx: TensorRtBackend, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "a.rtx").symlink_to(full)
    member, model = shipped_small()
    with pytest.raises(BuildFailed, match=r"can't be written: .*No space left on device") as caught:
        compile_member(rtx, member, model, tmp_path / "a.rtx")
    assert "TSTITCH_TRT_CACHE" in caught.value.hint
    assert full.exists()


# --- a whole build, stopped from outside


def process_tree(parent: int) -> Iterator[int]:
    """The workers whose parent is ``parent``."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            status = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if WORKER in command.split(b"\0") and int(status[1]) == parent:
            yield int(folder.name)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Any, what: str) -> Any:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited two minutes for {what}")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_build_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    cache, output = tmp_path / "cache", tmp_path / "fashion.bundle"
    process = subprocess.Popen(
        [sys.executable, "-m", "tstitch_trt.cli", "build", "fashion", "--backend", "tensorrt-rtx", "-o", output],
        env={**os.environ, "TSTITCH_TRT_CACHE": str(cache)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        (worker,) = wait_for(lambda: list(process_tree(process.pid)), "the worker")
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, said
    wait_for(lambda: not alive(worker), "the worker's end")
    assert not output.exists()
    if number != signal.SIGKILL:  # what a killed process leaves is removed by the next build
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
