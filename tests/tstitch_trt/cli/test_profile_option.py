"""``--profile``: the trace of a command tells what the plan says, and is there however the command ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tstitch_trt
from support.command import Command, refused
from tstitch_engines.trace import Trace, current_trace
from tstitch_trt.serve import Engine


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def events(path: Path) -> list[dict[str, Any]]:
    """The spans of a file that is one of Chrome's: each inside the one before it or after its end."""
    document = json.loads(path.read_bytes())
    assert document["displayTimeUnit"] in ("ms", "ns")
    for event in document["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["name"], str)
        assert {type(event[key]) for key in ("pid", "tid")} == {int}
        assert isinstance(event["args"], dict)
    found = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [event["ts"] for event in found] == sorted(event["ts"] for event in found)
    ends: dict[int, list[float]] = {}
    for event in found:
        stack = ends.setdefault(event["tid"], [])
        while stack and stack[-1] <= event["ts"]:
            stack.pop()
        event["inside"] = len(stack)
        stack.append(event["ts"] + event["dur"])
        assert stack == sorted(stack, reverse=True), f"{event} outlives what it is in"
    return found


def of(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in found if event["name"] == name]


def test_the_steps_of_a_trace_are_those_of_the_plan(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "trace.json", tmp_path / "grid.png"
    asked = ("--labels", "0-9", "--steps", "5", "--schedule", "small:2,large:2,small", "--guidance", "2")
    done = run("sample", fashion_bundle, *asked, "--profile", file, "-o", output, "--json")
    assert done.code == 0, done.err
    assert f"profile: {file}" in done.err
    found = events(file)
    chunks = of(found, "chunk")
    steps = of(found, "step")
    assert [chunk["args"] for chunk in chunks] == [
        {"chunk": 1, "chunks": 2, "images": 8}, {"chunk": 2, "chunks": 2, "images": 2},
    ]  # fmt: skip
    members = done.json["schedule"]["members"]
    assert [step["args"]["member"] for step in steps] == 2 * members
    assert [step["args"]["step"] for step in steps] == 2 * [1, 2, 3, 4, 5]
    assert [step["args"]["lanes"] for step in steps] == 5 * [8] + 5 * [2]
    for chunk in chunks:
        inside = [s for s in steps if chunk["ts"] <= s["ts"] < chunk["ts"] + chunk["dur"]]
        assert len(inside) == 5
        assert sum(s["dur"] for s in inside) <= chunk["dur"]
    assert {s["inside"] for s in steps} == {chunks[0]["inside"] + 1}
    for part in ("prepare", "engine", "advance"):
        assert {e["inside"] for e in of(found, part)} == {steps[0]["inside"] + 1}
        assert len(of(found, part)) == 10
    assert [e["args"]["network"] for e in of(found, "engine")] == 2 * members
    assert sum(s["dur"] for s in steps) / 1e3 <= done.json["total_ms"] + 1
    order = [e["name"] for e in found if e["inside"] == chunks[0]["inside"]]
    assert order == [
        "open bundle", "load engine", "load engine", "plan", "encode request", "chunk", "chunk", "wait and download",
        "decode", "wait and download", "decode", "write pictures",
    ]  # fmt: skip


def test_bench_records_trajectories_and_bare_calls(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    done = run(
        "bench", fashion_bundle, "--steps", 4, "--batch", 1, "--repeats", 1, "--warmup", 0, "--fractions", 0.5,
        "--profile", file,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = events(file)
    assert len(of(found, "step")) == 4
    bare = of(found, "bare engine calls")
    assert {e["args"]["member"] for e in bare} == {"small", "large"}
    assert len(of(found, "bare step kernels")) == 1


def test_a_command_that_fails_or_is_interrupted_leaves_its_trace(
    run: Command, fashion_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "failed.json"
    assert run("sample", fashion_bundle, "--labels", "99", "--profile", file).code == 2
    assert of(events(file), "load engine")
    assert current_trace() is None

    def interrupt() -> None:
        while (trace := current_trace()) is None or b'"step"' not in trace.to_json():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    file = tmp_path / "interrupted.json"
    threading.Thread(target=interrupt, daemon=True).start()
    done = run("sample", fashion_bundle, "--labels", "0", "--steps", "900", "--profile", file, "-o", tmp_path / "a.png")
    assert done.code == 130, done.err
    assert 1 <= len(of(events(file), "step")) < 900


def test_a_trace_that_can_not_be_written_hides_no_other_error(
    run: Command, fashion_bundle: Path, tmp_path: Path
) -> None:
    file = Path("/proc/self/trace.json")  # where nobody makes files
    done = run("sample", fashion_bundle, "--labels", "99", "--profile", file)
    refused(done, "label 99")
    assert f"no profile: {file}: " in done.err
    done = run("sample", fashion_bundle, "--labels", "3", "--steps", "1", "--profile", file, "-o", tmp_path / "a.png")
    assert done.code == 2
    assert "trace.json" in done.err


def test_what_can_not_be_profiled_is_refused(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    refused(run("sample", fashion_bundle, "--profile", tmp_path / "trace.txt"), ".json")
    refused(run("sample", fashion_bundle, "--profile", tmp_path / "no" / "trace.json"), "does not exist")
    refused(run("sample", fashion_bundle, "--ray", "--profile", tmp_path / "trace.json"), "without --ray")


def test_previews_of_a_callback_are_in_it(fashion_bundle: Path) -> None:
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime, Trace() as trace:
        runtime.sample(labels=[3], steps=2, callback=lambda event: event.preview() is not None)
    document = json.loads(trace.to_json())
    names = [event["name"] for event in document["traceEvents"] if event["ph"] == "X"]
    assert [name for name in names if name in ("chunk", "step", "decode")] == [
        "chunk", "step", "decode", "step", "decode", "decode",
    ]  # fmt: skip


def test_the_threads_of_a_server_have_tracks(fashion_bundle: Path) -> None:
    with Engine(fashion_bundle) as engine, Trace() as trace:
        engine.submit(labels=[3, 4], steps=4, fraction=0.5).result()
    document = json.loads(trace.to_json())["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in document if event["name"] == "thread_name"}
    found = [(tracks[e["tid"]], e["args"].get("member")) for e in document if e["name"] in ("step", "decode")]
    assert found == [("tstitch-denoise", m) for m in ("small", "small", "large", "large")] + [("tstitch-decode", None)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_nvtx_gets_the_same_spans(fashion_bundle: Path, tmp_path: Path) -> None:
    """The library nvtx with a tool loaded, as under Nsight Systems."""
    source, tool, log = Path(__file__).parents[2] / "support" / "nvtx_tool.cpp", tmp_path / "tool.so", tmp_path / "log"
    subprocess.run(["g++", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Werror", "-o", tool, source], check=True)
    set_here = {"NVTX_INJECTION64_PATH": str(tool), "NVTX_TOOL_LOG": str(log), "TSTITCH_TRT_NVTX": "1"}
    environment = {**os.environ, **set_here, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = ["sample", fashion_bundle, "--steps", "3", "--profile", tmp_path / "t.json", "-o", tmp_path / "a.png"]
    subprocess.run([sys.executable, "-m", "tstitch_trt.cli", *words], check=True, env=environment)
    lines = log.read_text().splitlines()
    begun = [line.split(" ", 3)[1:] for line in lines if line.startswith("start")]
    assert {domain for _, domain, _ in begun} == {"tstitch-trt"}
    spans = events(tmp_path / "t.json")
    said = [" ".join([one["name"], *(f"{name}={value}" for name, value in one["args"].items())]) for one in spans]
    assert [text for _, _, text in begun] == said
    assert sorted(line.split()[1] for line in lines if line.startswith("end")) == sorted(each for each, _, _ in begun)
