"""A budget in a request: the chosen schedule runs, and the result, its files and the commands say what was chosen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.command import Command, refused
from support.hand_made_parts import World
from support.studies import calibration, overhead, search, search_point, step_cost
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.errors import BadInput, NotCalibrated, Unavailable
from tstitch_trt.bench.bench import measure
from tstitch_trt.images.write import METADATA_KEY
from tstitch_trt.runtime.load import load
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.budget import Conditions, find_calibration, predict_ms
from tstitch_trt.study.budget.conditions import engine_digests
from tstitch_trt.study.store import save_study, weights_of

COST_MS = {"small": 1e4, "large": 1e5}  # of a made-up machine on which every budget is met


def calibrated(folder: Path, source: Path) -> Bundle:
    """A copy of the tiny pair that holds a calibration for one thread here, and a search."""
    shutil.copytree(source, folder)
    bundle = open_bundle(folder)
    with tstitch_trt.load(bundle, threads=1) as runtime:
        split = runtime.splitting
    cost = calibration(
        weights=weights_of(bundle.manifest),
        engines=engine_digests(bundle, "onnxruntime", "cpu"),
        splitting=split,
        upper_ratio=1.0,
        steps=tuple(
            step_cost(name, batch, ms * (2 if guided else 1), guided=guided)
            for name, ms in COST_MS.items()
            for guided in (False, True)
            for batch in (1, 8)
        ),
        overheads=(overhead(1, 0.0), overhead(8, 0.0)),
    )
    save_study(bundle, cost, key=Conditions.of(cost).key)
    points = (search_point("small:4", 30.0), search_point("small:2,large:2", 20.0), search_point("large:4", 10.0))
    save_study(bundle, search(weights=weights_of(bundle.manifest), points=points))
    return bundle


@pytest.fixture(scope="module")
def bundle(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return calibrated(tmp_path_factory.mktemp("budget") / "pair.bundle", tiny_pair.bundle)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with tstitch_trt.load(bundle, threads=1) as loaded:
        yield loaded


def test_the_chosen_schedule_runs(runtime: Runtime) -> None:
    result = runtime.sample(labels=[1, 2, 3], seed=5, latency_budget_ms=2.3e5)
    chosen = result.budget
    assert chosen is not None
    assert (chosen.source, chosen.schedule, chosen.images) == ("search", "small:2,large:2", 3)
    assert result.schedule.names == ("small", "small", "large", "large")
    assert chosen.predicted_ms == pytest.approx(2.2e5)
    assert chosen.size == (8, 8)
    assert result.total_ms < chosen.budget_ms
    plain = runtime.sample(labels=[1, 2, 3], seed=5, schedule="small:2,large:2", steps=4)
    np.testing.assert_array_equal(result.latents, plain.latents)
    assert plain.budget is None


def test_it_is_chosen_before_anything_runs_and_the_same_by_each_way(runtime: Runtime) -> None:
    chosen = runtime.within_budget(3.2e5, labels=[1], n=2)
    assert (chosen.schedule, chosen.interpolated) == ("small:1,large:3", True)
    walk = runtime.iterate(labels=[1], n=2, latency_budget_ms=3.2e5)
    events = [next(walk).member for _ in range(4)]
    with pytest.raises(StopIteration) as end:
        next(walk)
    assert end.value.value.budget == chosen
    assert events == ["small", "large", "large", "large"]


def test_what_the_request_fixes_stays(runtime: Runtime) -> None:
    result = runtime.sample(labels=[1], latency_budget_ms=3e5, steps=6, guidance=2.0, seed=1)
    assert result.budget is not None
    assert result.budget.source == "rule"
    assert result.schedule.names == ("small",) * 5 + ("large",)  # 5 x 20 s and 200 s
    assert result.plan.guided == (True,) * 6
    assert "guidance 2.0" in result.budget.notes[0]
    later = runtime.sample(
        latents=np.zeros((1, 4, 8, 8), np.float32), start_step=8, labels=[1], latency_budget_ms=1.2e5
    )
    assert later.budget is not None
    assert later.budget.predicted_ms == pytest.approx(1.1e5)  # two of ten steps
    assert later.schedule.names == ("small",) * 9 + ("large",)


@pytest.mark.parametrize("given", [{"schedule": "large"}, {"fraction": 0.4}])
def test_a_schedule_beside_a_budget_is_refused(runtime: Runtime, given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(BadInput, match=f"{name} .* beside a budget") as caught:
        runtime.sample(labels=[1], latency_budget_ms=1e5, **given)
    assert f"--{name} or --budget-ms" in caught.value.hint


def test_control_and_impossible_budgets_are_refused(runtime: Runtime) -> None:
    with pytest.raises(BadInput, match="ControlNet costs is not calibrated"):
        runtime.sample(labels=[1], latency_budget_ms=1e5, control=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(BadInput, match="the cheapest, small:4 "):
        runtime.iterate(labels=[1], latency_budget_ms=1.0)
    with pytest.raises(BadInput, match="latency budget of -1"):
        runtime.sample(labels=[1], latency_budget_ms=-1)
    with pytest.raises(BadInput, match="label 99"):
        runtime.sample(labels=[99], latency_budget_ms=1e5)


def test_without_a_calibration_nothing_is_guessed(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as bare, pytest.raises(NotCalibrated):
        bare.sample(labels=[1], latency_budget_ms=1e5)


def test_without_a_chooser_a_budget_is_refused(tiny_pair: TinyPair) -> None:
    with load(tiny_pair.bundle, threads=1) as bare, pytest.raises(Unavailable, match="without a chooser") as caught:
        bare.sample(labels=[1], latency_budget_ms=1e5)
    assert "tstitch_trt.load" in caught.value.hint


def test_a_study_written_later_is_seen(tiny_pair: TinyPair, tmp_path: Path) -> None:
    own = calibrated(tmp_path / "own.bundle", tiny_pair.bundle)
    with tstitch_trt.load(own, threads=1) as loaded:
        before = loaded.within_budget(1e6, labels=[1])
        assert before.quality == 10
        points = (search_point("small:3,large:1", 1.0),)
        save_study(own, search(weights=weights_of(own.manifest), points=points, made="2026-01-01T00:00:00Z"))
        assert loaded.within_budget(1e6, labels=[1]).quality == 1


def test_sample_prints_and_keeps_the_choice(bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    outcome = Command(capfd)(
        *("sample", bundle.root, "--labels", "1,2", "--budget-ms", "230000", "--threads", 1, "-o", out, "--json")
    )
    assert outcome.code == 0, outcome.err
    assert "budget 230000 ms: small:2,large:2 (ddim, 4 steps), predicted 220000.0 ms" in outcome.err
    assert "by the search of 2024-01-02T03:04:05Z: fid 20" in outcome.err
    said = outcome.json["budget"]
    assert (said["schedule"], said["source"], said["quality"], said["met"]) == ("small:2,large:2", "search", 20, True)
    assert outcome.json["schedule"]["members"] == ["small", "small", "large", "large"]
    with Image.open(out) as image:
        kept = json.loads(image.info[METADATA_KEY])
    assert kept["budget"] == said
    plain = Command(capfd)("sample", bundle.root, "--labels", "1", "--budget-ms", "230000", "--threads", 1, "-o", out)
    assert plain.code == 0, plain.err
    assert "the budget of 230000 ms is met" in plain.err


def test_the_commands_refuse(bundle: Bundle, tiny_pair: TinyPair, capfd: pytest.CaptureFixture[str]) -> None:
    run = Command(capfd)
    for option in (("--schedule", "large"), ("--fraction", "0.4")):
        refused(run("sample", bundle.root, "--threads", 1, "--budget-ms", 1e5, *option), option[0], "--budget-ms")
    refused(run("sample", bundle.root, "--threads", 1, "--budget-ms", "1"), "within 1 ms", "nearest feasible budget")
    refused(run("sample", bundle.root, "--budget-ms", "fast"), "'fast' is no number", "--budget-ms 500")
    refused(run("sample", bundle.root, "--budget-ms", "1,2"), "2 budgets", "allowed is one")
    refused(run("sample", bundle.root, "--threads", 2, "--budget-ms", 1e5), "threads was 1 and is 2", "calibrate")
    refused(run("sample", tiny_pair.bundle, "--budget-ms", 1e5), "no calibration", "tstitch-trt calibrate")
    refused(run("bench", bundle.root, "--threads", 1, "--budget-ms", "0"), "latency budget of 0")


def test_bench_measures_what_is_chosen(runtime: Runtime, bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    found = measure(runtime, fractions=(1.0,), budgets=(2.3e5, 1e6), steps=4, batch=2, repeats=2, warmup=0)
    assert [t.members for t in found.trajectories] == [{"small": 4}, {"small": 2, "large": 2}, {"large": 4}]
    assert [t.fraction for t in found.trajectories] == [1, 0.5, 0]
    assert found.trajectories[0].budget is None
    for timing in found.trajectories[1:]:
        chosen = timing.budget
        assert chosen is not None
        assert (chosen.met, chosen.runs, chosen.source) == (2, 2, "search")
    args = ("--budget-ms", "230000,1000000", "--batch", 2, "--repeats", 2, "--threads", 1)
    outcome = Command(capfd)("bench", bundle.root, *args)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("2 of 2") == 2
    assert "search: fid 20" in outcome.out
    told = Command(capfd)("bench", bundle.root, *args, "--json")
    assert [t["budget"]["met"] for t in told.json["trajectories"]] == [2, 2]


def test_the_budget_benchmark_goes_on_where_it_stopped(bundle: Bundle, tmp_path: Path) -> None:
    script = Path(__file__).parents[4] / "benchmarks" / "budget.py"

    def run(runs: int) -> subprocess.CompletedProcess[str]:
        args = ["--runs", str(runs), "--steps", "4", "--threads", "1", "--most", "3"]
        folders = ["--out", tmp_path / "budget.json", "--scratch", tmp_path / "scratch"]
        return subprocess.run([sys.executable, script, bundle.root, *args, *folders], capture_output=True, text=True)

    first = run(2)
    assert first.returncode == 0, first.stderr
    before = json.loads((tmp_path / "budget.json").read_text())["each"]
    more = run(4)
    assert more.returncode == 0, more.stderr
    assert "going on after 2 of 4 runs" in more.stderr
    assert "4 of 4 budgets met" in more.stdout
    said = json.loads((tmp_path / "budget.json").read_text())
    assert said["each"][:2] == before
    assert (said["runs"], said["met"]) == (4, 4)  # of a machine that is calibrated as a hundred times slower
    assert all(each["upper_ms"] <= each["budget_ms"] and 1 <= each["images"] <= 3 for each in said["each"])


def test_sizes_text_and_pictures_to_start_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bundle of text with dynamic sizes, whose last member paints into pictures."""
    made = World().bundle(tmp_path)
    sizes = ("--batch", "1,2", "--size", "64x64,96x64", "--repeats", 1, "--checks", 2, "--threads", 1)
    outcome = Command(capfd)("calibrate", made.root, *sizes, "--json")
    assert outcome.code == 0, outcome.err
    kinds = {(c["member"], c["guided"], c["batch"], c["width"], c["height"]) for c in outcome.json["steps"]}
    assert kinds == {
        (name, guided, batch, width, 8)
        for name in ("plain", "steered", "painter")
        for guided in (False, True)
        for batch in (1, 2)
        for width in (8, 12)
    }
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    mask = np.zeros((64, 96), np.bool_)
    mask[:, :50] = True
    with tstitch_trt.load(made, threads=1) as runtime:
        asked: dict[str, Any] = {"prompt": "a fox", "image": picture, "mask": mask, "strength": 0.5, "n": 2}
        result = runtime.sample(**asked, latency_budget_ms=1e9, decode=False)
        chosen = result.budget
        assert chosen is not None
        assert (chosen.schedule, chosen.images, chosen.size) == ("painter:6", 2, (8, 12))
        cost = find_calibration(runtime.bundle, Conditions.here(runtime.setup))
        assert chosen.predicted_ms == pytest.approx(predict_ms(cost, result.plan, batch=2, size=(8, 12), start=3))
        with pytest.raises(BadInput, match=r"10x8 .* were not calibrated; measured are 8x8, 12x8"):
            runtime.within_budget(1e9, prompt="a fox", height=64, width=80)
