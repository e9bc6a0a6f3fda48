"""``benchmarks/gpu.py`` on a machine without a GPU: its parts run for real on tiny models, its sums are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def run(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--out", str(out), "--scratch", str(out / "scratch"), *args]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env.pop("TSTITCH_TRT_CACHE", None)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def record(out: Path, name: str) -> Any:
    return json.loads((out / f"{name}.json").read_text())


CASE = "dit-tiny-tiny+-64-b2-fp32"
CONTENDERS = ("torch-eager", "ours:onnxruntime", "diffusers")
ON_CPU = ("--smoke", "--device", "cpu")  # told, it does not load torch to find out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "out"
    parts = f"ceilings,kernels,sanitizer,segments,{CASE}"
    done = run(out, *ON_CPU, "--parts", parts, "--contenders", ",".join(CONTENDERS))
    assert done.returncode == 0, done.stderr
    return out


def test_smoke_measures_every_contender_and_finds_them_equal(smoke: Path) -> None:
    part = record(smoke, CASE)
    assert part["status"] == "done", part
    for name in CONTENDERS:
        entry = part["entries"][name]
        assert entry["status"] == "ok", entry
        assert [row["fraction"] for row in entry["trajectories"]] == part["case"]["fractions"]
        assert all(row["wall_ms"]["median"] > 0 and row["tflops"] > 0 for row in entry["trajectories"])
        assert all(0 <= error < 1e-4 for error in entry["errors"].values()), entry["errors"]
    ours = part["entries"]["ours:onnxruntime"]
    assert set(ours["members"]) == {"small", "large"}
    assert not any(ours["calls_per_ten_steps"].values())  # no allocation, copy or wait for ten more steps
    assert part["machine"]["versions"]["numpy"] == np.__version__
    assert "--smoke" in part["command"]
    assert "torch-compile" in part["left_out"]


def test_segments_are_compared_with_steps_before_they_are_timed(smoke: Path) -> None:
    part = record(smoke, "segments")
    assert part["status"] == "done", part
    assert list(part["entries"]) == ["onnxruntime b1"]  # of the contenders that were chosen
    entry = part["entries"]["onnxruntime b1"]
    assert [row["fraction"] for row in entry["trajectories"]] == [0.0, 0.5]
    assert all(row["step_ms"]["median"] > 0 and row["segment_ms"]["median"] > 0 for row in entry["trajectories"])
    assert not entry["graphs"]
    assert "- onnxruntime b1, fraction 0.5: " in (smoke / "report.md").read_text()


def test_what_needs_a_gpu_says_so(smoke: Path) -> None:
    part = record(smoke, "sanitizer")
    assert part["status"] == "not run"
    assert part["reason"] == "not run: no CUDA device"


def test_the_report_claims_nothing_of_a_smoke_run(smoke: Path) -> None:
    text = (smoke / "report.md").read_text()
    assert "nothing here is a measurement" in text
    goals = text.partition("## Goals")[2].partition("## Parts")[0].strip().splitlines()[2:]
    assert len(goals) == 12
    assert all(line.endswith("| not measured |  |") for line in goals)
    assert f"| {CASE} | done |" in text


def test_a_second_run_measures_nothing_again(smoke: Path) -> None:
    """It finds the device by itself."""
    before = {name: record(smoke, name) for name in ("ceilings", "kernels", CASE)}
    done = run(smoke, "--smoke", "--parts", ",".join(before), "--contenders", ",".join(CONTENDERS))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done before") == len(before)
    assert before == {name: record(smoke, name) for name in before}


def test_an_unfinished_part_goes_on_after_its_last_entry(smoke: Path, tmp_path: Path) -> None:
    old = record(smoke, "ceilings")
    kept, lost = old["entries"]
    old["status"] = "partial"
    old["entries"][kept]["seconds"] = 1234.5
    old["entries"][lost] = {"status": "running", "tries": 1}
    (tmp_path / "ceilings.json").write_text(json.dumps(old))
    assert run(tmp_path, *ON_CPU, "--parts", "ceilings").returncode == 0
    new = record(tmp_path, "ceilings")
    assert new["status"] == "done"
    assert new["entries"][kept] == old["entries"][kept]
    assert new["entries"][lost]["status"] == "ok"
    assert new["entries"][lost]["tries"] == 2


@pytest.mark.parametrize("other", [{"device": "cuda:0"}, {"gpus": ["NVIDIA H200"]}], ids=["device", "GPU"])
def test_what_another_device_measured_is_measured_again(other: dict[str, Any], smoke: Path, tmp_path: Path) -> None:
    old = record(smoke, "ceilings") | other
    (tmp_path / "ceilings.json").write_text(json.dumps(old))
    assert run(tmp_path, *ON_CPU, "--parts", "ceilings").returncode == 0
    new = record(tmp_path, "ceilings")
    assert (new["device"], new["gpus"]) == ("cpu", [])
    assert all(new["entries"][name] != entry for name, entry in old["entries"].items())


def test_list_names_the_parts_in_the_order_of_their_worth(tmp_path: Path) -> None:
    done = run(tmp_path, "--list")
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert names[:5] == ["tests", "sanitizer", "rtx", "ceilings", "dit-s-xl-256-b8-fp16"]
    assert names[-1] == "train"
    assert all(line.endswith("\tto do") for line in done.stdout.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "value", "allowed"),
    [
        (("--parts", "cielings"), "'cielings'", "did you mean 'ceilings'?"),
        (("--contenders", "torch-egaer"), "'torch-egaer'", "did you mean 'torch-eager'?"),
        (("--rounds", "0"), "--rounds 0", "leave them out"),
        (("--rtx-site", "1.6.1"), "'1.6.1'", "--rtx-site 1.6.1="),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, args: tuple[str, ...], value: str, allowed: str) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == 2
    assert done.stdout == ""
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert value in error
    assert hint.startswith("hint: ")
    assert allowed in hint


@pytest.mark.parametrize(("model", "pixels", "giga"), [("S/2", 256, 6.06), ("B/2", 256, 23.01), ("L/2", 256, 80.71),
                                                       ("XL/2", 256, 118.64), ("XL/2", 512, 524.60)])  # fmt: skip
def test_work_is_that_of_the_papers_tables(model: str, pixels: int, giga: float) -> None:
    """arXiv 2212.09748, tables 1 and 4, which count a multiply-add as one."""
    from gpubench.flops import dit_work

    assert dit_work(model, pixels).flops / 2e9 == pytest.approx(giga, rel=5e-3)


def test_work_counts_the_parameters_and_products_of_the_module() -> None:
    torch = pytest.importorskip("torch")
    from gpubench.flops import dit_work
    from gpubench.models import random_dit
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    module, work = random_dit("tiny+", 64), dit_work("tiny+", 64)
    assert sum(p.numel() for p in module.parameters()) == work.parameters
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(torch.randn(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    assert counter.get_total_flops() == 3 * work.flops


def test_one_contender_of_any_part_fits_the_nine_minutes() -> None:
    from gpubench.cases import dit_cases
    from gpubench.flops import contender_seconds

    longest = {case.name: contender_seconds(case, 5) for case in dit_cases(smoke=False)}
    assert max(longest.values()) < 240, longest  # what is left is for building, compiling and the reference


def test_what_the_cache_served_is_held_against_no_copy(tmp_path: Path) -> None:
    from gpubench.report import report

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "p10": value, "p90": value}

    entries: dict[str, Any] = {"copy": {"gb_per_s": spread(4000.0)}}
    for lanes, cached, rate in ((256, True, 9000.0), (8192, False, 3000.0)):
        entries[f"float16 {lanes} lanes"] = {"pair_us": spread(1.0), "gb_per_s": spread(rate), "in_l2": cached}
    for entry in entries.values():
        entry |= {"status": "ok", "seconds": 1.0}
    machine = {"gpus": ["some GPU"], "processor": "p", "cores": 1, "python": "3", "versions": {}}
    part = {"part": "kernels", "status": "done", "smoke": False, "entries": entries, "machine": machine, "command": "c"}
    (tmp_path / "kernels.json").write_text(json.dumps(part))
    text = report(tmp_path, ["kernels"], smoke=False).read_text()
    assert "| float16 256 lanes | 1.00 | 9000 | from the L2 cache |" in text
    assert "| float16 8192 lanes | 1.00 | 3000 | 75.0% |" in text


def test_contenders_share_what_torch_inductor_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpubench.script import share_inductor_cache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    share_inductor_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    share_inductor_cache(tmp_path)
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path


def event(name: str, cat: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "args": args}


def test_a_trace_tells_gaps_and_what_does_not_belong_into_a_step() -> None:
    from gpubench.trace import STRETCH, analyse

    clean = [
        event(STRETCH, "user_annotation", 100, 50),
        event("cudaMemcpyAsync", "cuda_runtime", 90, 2, 1),  # before
        event("Memcpy HtoD", "gpu_memcpy", 101, 3, 1),
        event("cudaGraphLaunch", "cuda_runtime", 110, 2, 2),
        event("cudaEventRecord", "cuda_runtime", 113, 1, 4),
        event("cudaGraphLaunch", "cuda_runtime", 120, 2, 3),
        event("a", "kernel", 130, 10, 2),
        event("b", "kernel", 135, 10, 2),  # overlaps
        event("c", "kernel", 150, 10, 3),
        event("cudaStreamSynchronize", "cuda_runtime", 155, 9, 5),  # after
    ]
    found = analyse(clean)
    assert found["clean"]
    assert found["calls"] == {"cudaGraphLaunch": 2, "cudaEventRecord": 1}
    assert found["gaps"] == {
        "span_us": 30, "idle_us": 5, "idle_share": 5 / 30, "count": 1,
        "median_us": 5, "p90_us": 5, "largest_us": 5,
    }  # fmt: skip
    for name, kind in (
        ("cudaStreamSynchronize", "waits"),
        ("cudaMalloc", "allocations"),
        ("cuMemcpyDtoDAsync", "copies"),
    ):
        found = analyse([*clean, event(name, "cuda_runtime", 125, 1, 9)])
        assert not found["clean"]
        assert found[kind] == {name: 1}
    copied = analyse([*clean, event("Memcpy DtoD", "gpu_memcpy", 146, 1, 3)])  # by a recorded graph
    assert not copied["clean"]
    assert analyse(clean[:1])["clean"] is None  # a profiler that saw nothing proves nothing
    with pytest.raises(ValueError, match="annotation"):
        analyse(clean[1:])


def test_the_report_judges_goals_by_what_was_measured(tmp_path: Path) -> None:
    from gpubench.report import report

    def contender(ms: float, tflops: float) -> dict[str, Any]:
        row = {"fraction": 0.0, "wall_ms": {"median": ms, "p10": ms, "p90": ms}, "tflops": tflops}
        ours = {"overhead": {"median": 1.02}, "measured_over_predicted": 0.985}
        return {"status": "ok", "seconds": 1.0, "errors": {"0.0": 0.001}, "trajectories": [row | ours]}

    ceiling = {"status": "ok", "matmul": {"tflops": {"median": 700.0}}}
    machine = {"gpus": ["NVIDIA H200, 580.1"], "processor": "p", "cores": 1, "python": "3", "versions": {}}
    for name, mine in (("dit-s-xl-256-b8-fp16", 490.0), ("dit-s-xl-256-b1-fp16", 100.0)):
        entries = {"ceilings": ceiling, "ours:torch": contender(10.0, mine), "torch-eager": contender(31.0, 9.0),
                   "torch-compile": contender(11.0, 9.0)}  # fmt: skip
        for other in ("torch-eager", "torch-compile"):
            entries[other]["trajectories"][0].pop("overhead")
        part = {"part": name, "status": "done", "smoke": False, "case": {"steps": 100}, "entries": entries,
                "machine": machine, "command": "c"}  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    text = report(tmp_path, ["dit-s-xl-256-b8-fp16", "dit-s-xl-256-b1-fp16"], smoke=False).read_text()
    goals = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    met = {goal.removeprefix("| "): (measured, end) for goal, measured, end, *_ in goals if end.endswith("|")}
    assert met["runtime overhead at most 1.01"][1] == "**no** |"
    assert met["trajectory within 2 % of the prediction at any fraction"][1] == "yes |"
    share = met["DiT-XL/2 batch 8 fp16, 100 steps: at least 60 % of the measured matrix ceiling"]
    assert share[0].startswith("70.0% (490 of 700 TFLOP/s of a large product in the same part, ")
    assert "; 49.5% of the vendor's peak" in share[0]
    assert share[1] == "yes |"
    assert met["DiT-XL/2 batch 1 fp16: at least 3x torch-eager"][0].startswith("3.10x")
    assert met["DiT-XL/2 batch 1 fp16: at least 1.2x torch-compile"][1] == "**no** |"
    assert met["no growth of device memory over 1,000 trajectories"][0] == "not measured"
