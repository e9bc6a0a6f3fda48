"""Every option of ``load`` and of the commands that load is honoured, or refused by name."""

from __future__ import annotations

import gc
import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tstitch_trt
from support.bundles import draw
from support.command import Command, refused
from support.tiny import TinyPair
from tstitch_engines.backends import open_backend
from tstitch_engines.backends.onnxruntime import _OnnxRuntimeEngine
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.compile.select import check_load_options
from tstitch_engines.device.host import HostDevice
from tstitch_engines.errors import BadInput, OutOfMemory, Unavailable

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def copy(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pair.bundle, tmp_path / "copy.bundle"))


def test_graphs_asked_for_where_there_are_none(run: Command, copy: Path, tmp_path: Path) -> None:
    for mode in ("step", "segment"):
        with pytest.raises(Unavailable, match=f"graph = {mode}: the device cpu has no graphs"):
            tstitch_trt.load(copy, graph=mode)  # type: ignore[arg-type]
        refused(run("sample", copy, "--graph", mode), f"graph = {mode}", "--device cuda")
    for mode in ("auto", "off"):
        with tstitch_trt.load(copy, graph=mode) as runtime:  # type: ignore[arg-type]
            assert (runtime.graphs().mode, runtime.graphs().reason) == ("off", "the device cpu has no graphs")
    refused(run("bench", copy, "--graph", "all"), "'all'", "auto, step, segment, off")
    bench = run("bench", copy, "--steps", 2, "--repeats", 1, "--fractions", 0, "--json").json
    assert bench["graph"]["mode"] == "off"
    assert "graphs     off (the CPU has no graphs)" in run("inspect", copy).out


@pytest.mark.parametrize("said", ["many", "-1", "0", "1e3", "100000", "9" * 5000, "²"])
def test_what_openmp_is_told_is_a_number_of_threads(
    tiny_pair: TinyPair, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    with pytest.raises(BadInput, match=r"OMP_NUM_THREADS is .*; allowed is a whole number from 1 to"):
        tstitch_trt.load(tiny_pair.bundle, verify="size")


@pytest.mark.parametrize("threads", [100_000, 10**30, -1, True, 1.0, "4"])
def test_threads_have_a_limit(tiny_pair: TinyPair, threads: Any) -> None:
    """As many more as a process may have ended in a segmentation fault."""
    with pytest.raises(BadInput, match=r"threads is .*; allowed is a whole number from 0 to"):
        tstitch_trt.load(tiny_pair.bundle, threads=threads)


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("2,1", 2), ("", 0), (None, 0)])
def test_threads_are_by_default_those_of_openmp(
    tiny_pair: TinyPair, said: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime starts that many less the caller's own for each engine."""
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    gc.collect()  # engines of other tests end their threads before it is counted
    before = len(list(Path("/proc/self/task").iterdir()))
    with tstitch_trt.load(tiny_pair.bundle) as runtime:
        assert runtime.threads == threads
        started = len(list(Path("/proc/self/task").iterdir())) - before
        if threads:
            assert started == (threads - 1) * len(runtime.manifest.networks())
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as runtime:
        assert runtime.threads == 1


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt-rtx", "torch"])
def test_threads_are_for_engines_on_the_cpu(name: str, copy: Path) -> None:
    """Whatever the backend: on a GPU no engine honours them."""
    if name == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    opened, backend = open_bundle(copy), open_backend(name)
    record = opened.manifest.members["small"].engines[0]
    with pytest.raises(BadInput, match=rf"threads = 4 can't be honoured by the {name} engine of member 'small'"):
        check_load_options(opened, "small", record, backend, "cuda:0", {"threads": 4})
    check_load_options(opened, "small", record, backend, "cuda:0", {"threads": None})
    if name != "tensorrt-rtx":
        check_load_options(opened, "small", record, backend, "cpu", {"threads": 4})


@needs_rtx
def test_an_engine_that_streams_its_weights_refuses_graphs(copy: Path) -> None:
    opened, backend = open_bundle(copy), open_backend("tensorrt-rtx")
    record = opened.manifest.members["small"].engines[0]
    identity = msgspec.structs.replace(record.identity, options={"weight-streaming": True})
    record = msgspec.structs.replace(record, identity=identity)
    with pytest.raises(BadInput, match=r"graph = step can't be honoured .* streams weights"):
        check_load_options(opened, "small", record, backend, "cuda:0", {"graph": "step"})


def test_every_option_of_load_is_honoured_or_refused_on_the_cpu(copy: Path) -> None:
    with pytest.raises(BadInput, match="stream="):
        tstitch_trt.load(copy, stream=1)
    with pytest.raises(BadInput, match="threads is -1"):
        tstitch_trt.load(copy, threads=-1)
    draw(copy, threads=1, verify="size", graph="off", backend="onnxruntime", device="cpu")


def test_engines_are_closed_where_there_is_no_room_for_lanes(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them, and what that raises does not hide why."""
    closed: list[object] = []

    def full(*_: object) -> None:
        raise OutOfMemory("no room", hint="")

    def close(engine: object) -> None:
        closed.append(engine)
        raise RuntimeError(f"close {len(closed)}")

    monkeypatch.setattr(HostDevice, "empty", full)
    monkeypatch.setattr(_OnnxRuntimeEngine, "close", close)
    with caplog.at_level(logging.WARNING), pytest.raises(OutOfMemory, match="no room"):
        tstitch_trt.load(tiny_pair.bundle, threads=1)
    assert len(closed) == 2
    assert "close 1" in caplog.text
