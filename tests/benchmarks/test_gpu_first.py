"""``benchmarks/gpu_first.sh`` without a GPU: its plan, what it makes of ends of all kinds, and a dry run."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.nvidia_driver import OLD, install_driver

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [str(FOLDER / "gpu_first.sh"), "--smoke", "--device", "cpu", "--scratch", str(out / "scratch"), *words]
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TSTITCH_TRT_CACHE", None)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def run(out: Path, *words: str) -> tuple[int, str]:
    process = start(out, *words)
    text, _ = process.communicate(timeout=390)
    return process.returncode, text


def record(out: Path) -> Any:
    return json.loads((out / "first.json").read_text())


# --- the plan


@pytest.mark.parametrize("smoke", [True, False])
def test_every_step_is_a_part_that_there_is(smoke: bool, tmp_path: Path) -> None:
    from gpubench.cases import CONTENDERS
    from gpubench.first_steps import first_steps
    from gpubench.record import Context

    work_of = importlib.import_module("gpu")._work
    context = Context(
        out=tmp_path, scratch=tmp_path, smoke=smoke, device="cpu", deadline=0, rounds=1, only=(), command=""
    )
    steps = first_steps(smoke=smoke)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert work_of(context, step.part)
        assert set(step.contenders) <= set(CONTENDERS)
        assert 0 < step.minutes <= 9
        assert bool(step.expected) == bool(step.signs)
        assert not step.expected or step.fallback
        re.compile(step.signs)


def test_the_first_run_reaches_pictures_graphs_and_ceilings() -> None:
    """What waits for nobody comes first, what takes long last."""
    from gpubench.first_steps import STEPS

    names = [step.name for step in STEPS]
    order = ["machine", "device", "fashion", "half", "rtx", "block", "capture", "ceilings", "xl-bf16", "streams"]
    assert [name for name in names if name in order] == order
    assert names.index("streams") < names.index("launches") < names.index("soak") < names.index("sanitizer")


# --- what a step's end means


def part(status: str = "done", reason: str = "", **entries: str) -> dict[str, Any]:
    """``entries``: a name -> its status, and after a colon the reason."""
    found = {}
    for name, text in entries.items():
        word, _, why = text.partition(":")
        found[name.replace("__", "; fallback: ")] = {"status": word, "reason": why}
    return {"status": status, "reason": reason, "entries": found}


@pytest.mark.parametrize(
    ("record", "problem", "status", "why"),
    [
        (part(a="ok", b="ok"), None, "proved", ""),
        (part(a="ok", b="not run:no such library"), None, "proved", "without b: no such library"),
        (part(b="not run:no such library"), None, "not run", "b: no such library"),
        (part("not run", "not run: no CUDA device", a="ok"), None, "not run", "no CUDA device"),
        (part(a="ok", b="failed:error 901"), None, "failed", "b: error 901"),
        (part("not run", "not run: no CUDA device", a="failed:wrong"), None, "failed", "a: wrong"),
        (part(a="failed:error 901", a__off="ok"), None, "failed", "a: error 901; worked: a; fallback: off"),
        (part("partial", a="ok", b="put off:time"), None, "not run", "in part (a): its time was over"),
        (part("partial", a="ok", b="running"), "stopped after 1 minutes", "not run", "in part (a): stopped after"),
        (part("failed", "KeyboardInterrupt", a="ok"), "interrupted", "not run", "in part (a): interrupted"),
        (part("partial", a="ok", b="running"), "its process ended with -11", "failed", "ended with -11, in b"),
        (part("failed", "OSError: disk"), None, "failed", "OSError: disk"),
        (None, None, "failed", "left no record"),
        (part(), None, "not run", "no entries"),
    ],
)
def test_what_is_proved(record: Any, problem: str | None, status: str, why: str) -> None:
    from gpubench.first import judge
    from gpubench.first_steps import FirstStep

    found, said = judge(FirstStep(name="a", part="a", minutes=1, proves=""), record, problem)
    assert found == status
    assert why in said


def test_contenders_of_another_step_are_not_judged() -> None:
    from gpubench.first import judge
    from gpubench.first_steps import FirstStep

    step = FirstStep(name="a", part="a", minutes=1, proves="", contenders=("torch-eager",))
    both = part(reference="ok", **{"torch-eager": "ok", "torch-compile": "failed:no compiler"})
    assert judge(step, both, None) == ("proved", "")
    assert judge(FirstStep(name="a", part="a", minutes=1, proves=""), both, None)[0] == "failed"


def test_tensorrt_rtx_is_proved_by_a_run_alone() -> None:
    from gpubench.first import judge
    from gpubench.first_steps import STEPS

    step = next(step for step in STEPS if step.name == "rtx")
    steps = [{"step": "build", "problem": "it returned nothing", "messages": ["ERROR: compute capability 9.0"]}]
    refused = part(a="ok")
    refused["entries"]["a"] |= {"runs": False, "steps": steps}
    status, why = judge(step, refused, None)
    assert status == "failed"
    assert "compute capability 9.0" in why
    assert step.is_expected(why)
    refused["entries"]["a"]["runs"] = True
    assert judge(step, refused, None) == ("proved", "")


@pytest.mark.parametrize(
    ("device", "cuda", "why"),
    [
        ("cuda:0", OLD, "is for CUDA 13 (driver 580 or newer); the driver here runs CUDA 12.4"),
        ("cpu", OLD, "is for CUDA 13 (driver 580 or newer); the driver here runs CUDA 12.4"),  # PyTorch saw none
        ("cuda:0", 13000, ""),
    ],
)
def test_a_driver_is_too_old_for_what_is_installed(
    device: str, cuda: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvidia_driver: Path
) -> None:
    """Packages for CUDA 12 would do for a driver that is older than 580."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from gpubench.first import judge
    from gpubench.first_parts import machine_part
    from gpubench.first_steps import STEPS
    from gpubench.record import Context, Part
    from gpubench.supervise import default_device

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H100 PCIe, 550.54.15, 9.0, 350 W, 1755 MHz, 81559 MiB\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    install_driver(monkeypatch, nvidia_driver, cuda=cuda)
    until = time.monotonic() + 60
    context = Context(
        out=tmp_path, scratch=tmp_path, smoke=False, device=device, deadline=until, rounds=1, only=(), command=""
    )
    part = Part(context, "machine", {})
    part.finish(lambda: machine_part(context, part))
    status, found = judge(STEPS[0], part.data, None)
    assert part.entries["nvidia-smi"]["status"] == "ok"
    assert why in found
    assert ("torch: it sees no GPU" in found) == (default_device() == "cpu")
    assert ("is for CUDA" in found) == bool(why)
    if why:
        assert (status, STEPS[0].is_expected(found)) == ("failed", True)


# --- runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    out = tmp_path_factory.mktemp("first") / "out"
    return (out, *run(out, "--steps", "machine,ceilings"))


def test_a_dry_run_says_what_is_proved_and_keeps_one_record(smoke: tuple[Path, int, str]) -> None:
    out, code, text = smoke
    assert code == 0, text
    said = record(out)
    assert said["smoke"]
    assert {name: step["status"] for name, step in said["steps"].items()} == {
        "machine": "not run",
        "ceilings": "proved",
    }
    assert said["parts"]["machine"]["entries"]["doctor"]["doctor"]["usable"]
    table = text[text.index("\nstep ") :].splitlines()
    assert "nothing here is proved of a GPU" in table[1]
    assert any(re.match(r"ceilings +proved +\d+", line) for line in table)
    assert any(re.match(r"machine +not run +\d+ +no CUDA device", line) for line in table)
    assert any(re.match(r"rtx +not run +0", line) for line in table)
    assert (out / "first.log").read_text() == text
    assert {path.name for path in out.iterdir()} == {"first.json", "first.log", "scratch"}


def test_what_is_proved_is_not_run_again_even_elsewhere(smoke: tuple[Path, int, str], tmp_path: Path) -> None:
    before = record(smoke[0])
    code, text = run(tmp_path, "--from", str(smoke[0] / "first.json"), "--steps", "ceilings")
    assert code == 0, text
    assert "ceilings: proved before" in text
    after = record(tmp_path)
    assert after["parts"] == before["parts"]
    assert len(after["runs"]) == 2
    failed = record(tmp_path)
    failed["steps"]["ceilings"]["status"] = "failed"
    lost, kept = failed["parts"]["ceilings"]["entries"]
    failed["parts"]["ceilings"]["entries"][lost] = {"status": "failed", "reason": "out of memory", "tries": 1}
    (tmp_path / "first.json").write_text(json.dumps(failed))
    code, text = run(tmp_path, "--steps", "ceilings")
    assert code == 0, text
    entries = record(tmp_path)["parts"]["ceilings"]["entries"]
    assert entries[lost]["status"] == "ok"
    assert entries[kept] == before["parts"]["ceilings"]["entries"][kept]
    code, text = run(tmp_path, "--steps", "ceilings", "--again")
    assert code == 0, text
    assert record(tmp_path)["parts"]["ceilings"]["entries"][kept] != entries[kept]


@pytest.mark.slow
def test_every_step_runs_dry(tmp_path: Path) -> None:
    """No entry fails: what there is no device for says so, and the rest is done on tiny models."""
    code, text = run(tmp_path, "--minutes", "6")
    assert code == 0, text
    said = record(tmp_path)
    assert {step["status"] for step in said["steps"].values()} == {"proved", "not run"}, said["steps"]
    why = {step["why"].partition(" (")[0] for step in said["steps"].values() if step["status"] == "not run"}
    assert why == {"no CUDA device"}
    for name, backend in (("fashion", "torch sample"), ("half", "bf16 torch"), ("launches", "onnxruntime")):
        assert said["parts"][name]["entries"][backend]["status"] == "ok"


def test_a_record_of_another_device_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpubench.first import main

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest-timeout's and Python's own stay
    text = json.dumps({"smoke": False, "device": "cuda:0", "steps": {}, "parts": {}, "runs": []})
    (tmp_path / "first.json").write_text(text)
    assert main(["--out", str(tmp_path), "--device", "cpu", "--smoke"]) == 2
    said = capsys.readouterr().err
    assert "is of the device cuda:0; this run is on the device cpu, a dry run" in said
    assert "hint: give another folder" in said
    assert (tmp_path / "first.json").read_text() == text


def test_a_record_of_another_gpu_model_is_not_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpubench.first import main

    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho NVIDIA H200, 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    place = {"smoke": True, "device": "cuda:0", "gpus": ["NVIDIA H100 80GB HBM3"]}
    before = {**place, "steps": {}, "parts": {}, "runs": []}
    (tmp_path / "before.json").write_text(json.dumps(before))
    words = ["--out", str(tmp_path / "out"), "--device", "cuda:0", "--smoke", "--from", str(tmp_path / "before.json")]
    assert main(words) == 2
    assert "the device cuda:0 (NVIDIA H100 80GB HBM3), a dry run; this run is on the device cuda:0 (NVIDIA H200)" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "first.json").exists()


def test_no_step_begins_when_the_time_is_over(tmp_path: Path) -> None:
    """A failure keeps its reasons until it is tried again, and what is forgotten is proved no more."""
    entries = {"matmul": {"status": "failed", "reason": "out of memory", "tries": 1}}
    failed = {"status": "failed", "why": "matmul: out of memory", "seconds": 1.0}
    before = {"smoke": True, "device": "cpu", "gpus": [], "runs": [], "steps": {"ceilings": failed}}
    before["parts"] = {"ceilings": {"part": "ceilings", "status": "done", "entries": entries}}
    (tmp_path / "first.json").write_text(json.dumps(before))
    code, text = run(tmp_path, "--steps", "ceilings", "--minutes", "0.1")
    assert code == 1, text
    assert record(tmp_path)["parts"]["ceilings"]["entries"] == entries
    code, text = run(tmp_path, "--steps", "ceilings", "--minutes", "0.1", "--again")
    assert code == 0, text
    state = record(tmp_path)["steps"]["ceilings"]
    assert (state["status"], state["why"]) == ("not run", "no time was left")


def test_an_end_from_outside_keeps_the_record_and_ends_the_work(tmp_path: Path) -> None:
    process = start(tmp_path, "--steps", "machine,prepare,soak")
    parts = tmp_path / "scratch" / "first-smoke" / "soak.json"
    until = time.monotonic() + 120
    while not parts.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 130, text
    assert re.search(r"^soak +not run +\d+ +in part .*interrupted$", text, re.MULTILINE)
    said = record(tmp_path)
    assert said["steps"]["machine"]["status"] == "not run"
    assert said["steps"]["soak"]["status"] == "not run"
    assert "interrupted" in said["steps"]["soak"]["why"]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--steps", "fashoin"), ("'fashoin'", "did you mean 'fashion'?")),
        (("--minutes", "0"), ("--minutes 0", "more than 0")),
        (("--steps", ","), ("names no step",)),
        (("--smoke", "--device", "cpu", "--from", "gone.json"), ("--from gone.json",)),
    ],
)
def test_bad_input_is_refused_with_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    from gpubench.first import main

    assert main(["--out", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    for each in (*parts, "hint:"):
        assert each in said


@pytest.mark.parametrize("words", [["--wheels"], ["--wheels", "gone"], ["--wheels", "."]])
def test_a_folder_without_wheels_is_refused(tmp_path: Path, words: list[str]) -> None:
    command = [str(FOLDER / "gpu_first.sh"), *words]
    env = {**os.environ, "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "there are no wheels\nhint: --wheels DIR" in done.stderr
    assert not (tmp_path / "out").exists()
