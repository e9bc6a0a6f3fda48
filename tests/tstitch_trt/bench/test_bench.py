"""Measuring: what is computed, never how fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.command import Command
from support.hand_made_parts import World
from support.tiny import TinyPair
from tstitch_engines.errors import BadInput
from tstitch_trt.bench.bench import measure
from tstitch_trt.bench.torch_eager import EagerTorch
from tstitch_trt.reference.torch_module import dit_weights
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.statistics import spread


@pytest.fixture(scope="module")
def runtime(tiny_pair: TinyPair) -> Iterator[Runtime]:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as loaded:
        yield loaded


def test_the_figures_fit_each_other(runtime: Runtime) -> None:
    bench = measure(runtime, fractions=(0.0, 0.4, 1.0), steps=10, batch=2, repeats=3, guidance=1.0)
    step = {member.name: member.step_ms for member in bench.members}
    assert list(step) == ["small", "large"]
    assert [t.members for t in bench.trajectories] == [{"large": 10}, {"small": 4, "large": 6}, {"small": 10}]
    for t in bench.trajectories:
        assert t.predicted_ms == pytest.approx(sum(step[name] * count for name, count in t.members.items()))
        assert t.measured_over_predicted == pytest.approx(t.ms / t.predicted_ms)
        assert t.images_per_second == pytest.approx(2000 / t.ms)
        assert 0 < t.p10_ms <= t.ms <= t.p90_ms
        assert t.overhead > 0
    overheads = [t.overhead for t in bench.trajectories]
    assert bench.overhead > 0
    assert len(overheads) == 3
    assert bench.steps == 10
    assert bench.solver == "ddim"
    assert bench.step_kernels_ms > 0
    assert bench.peak_memory_bytes > 1 << 20
    assert bench.machine.versions["onnxruntime"]


def test_guided_calls_are_measured_as_such_and_all_members_are_there(runtime: Runtime) -> None:
    bench = measure(runtime, fractions=(1.0,), steps=6, repeats=1, guidance=2.0, guidance_interval=(0, 3))
    kinds = [(m.name, m.guided) for m in bench.members]
    assert kinds == [("small", False), ("small", True), ("large", True)]
    assert bench.batch == 4  # the profile's largest is 8, and guidance doubles it
    steps = {(m.name, m.guided): m.step_ms for m in bench.members}
    want = 3 * steps["small", True] + 3 * steps["small", False]
    assert bench.trajectories[0].predicted_ms == pytest.approx(want)


def test_a_bundle_of_one_member_has_one_trajectory(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.alone("large"), threads=1) as alone:
        bench = measure(alone, fractions=(0.0, 0.5), steps=4, repeats=1)
    assert [t.members for t in bench.trajectories] == [{"large": 4}]


def test_spread_is_median_and_outer_deciles() -> None:
    assert spread(range(11)) == (5, 1, 9)


def test_weights_come_back_from_the_graph_bit_for_bit(tiny_pair: TinyPair, runtime: Runtime) -> None:
    for name, member in runtime.manifest.members.items():
        want = {key: value.numpy() for key, value in tiny_pair.model(name).state_dict().items()}
        got = dit_weights(runtime.bundle.path(member.onnx[0]), {key: value.shape for key, value in want.items()})
        for key, value in want.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "euler"])
def test_the_eager_baseline_draws_the_same_latents(runtime: Runtime, solver: str) -> None:
    settings = {"steps": 8, "solver": solver, "guidance": 2.0, "guided_channels": 3, "fraction": 0.5}
    noise = np.random.default_rng(1).standard_normal((3, 4, 8, 8), np.float32)
    ours = runtime.sample(labels=[1, 2, 3], latents=noise, **settings).latents  # type: ignore[arg-type]
    theirs = EagerTorch.of(runtime.bundle, threads=1).walk(runtime.plan(**settings), noise, [1, 2, 3])
    assert np.abs(theirs - ours).max() < 1e-4 * np.abs(ours).max()


def test_bench_against_torch_refuses_solvers_that_draw_noise(runtime: Runtime) -> None:
    baseline = EagerTorch.of(runtime.bundle, threads=1)
    with pytest.raises(BadInput, match="draws noise"):
        measure(runtime, fractions=(0.5,), steps=4, repeats=1, solver="ddpm", baseline=baseline)


def test_bench_against_another_model_refuses_to_compare_times(runtime: Runtime) -> None:
    class Wrong(EagerTorch):
        def walk(self, plan, noise, labels):  # type: ignore[no-untyped-def]
            return super().walk(plan, noise, [0] * len(labels))

    right = EagerTorch.of(runtime.bundle, threads=1)
    wrong = Wrong(right.models, right.null, right.version, 1)
    with pytest.raises(BadInput, match="other latents"):
        measure(runtime, fractions=(0.5,), steps=4, repeats=1, guidance=1.0, baseline=wrong)


def test_bench_command_prints_json_and_draws(
    tiny_pair: TinyPair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = "--fractions 0,0.4,1 --steps 5 --repeats 2 --guidance 1 --threads 1 --against torch --json"
    outcome = Command(capfd)("bench", tiny_pair.bundle, *args.split(), "--plot", tmp_path / "b.png")
    assert outcome.code == 0, outcome.err
    said = outcome.json
    assert [m["name"] for m in said["members"]] == ["small", "large"]
    assert [t["fraction"] for t in said["trajectories"]] == [0, 0.4, 1]
    assert {"schedule", "ms", "predicted_ms"} <= set(said["trajectories"][0])
    assert said["overhead"] > 0
    assert said["machine"]["cores"] >= 1
    assert all(t["relative_difference"] < 1e-4 for t in said["against"]["trajectories"])
    with Image.open(tmp_path / "b.png") as image:
        assert image.size[0] > 600


def test_bench_command_prints_tables(tiny_pair: TinyPair, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = Command(capfd)(
        "bench", tiny_pair.bundle, "--fractions", "0.5", "--steps", 4, "--repeats", 1, "--batch", 2
    )
    assert outcome.code == 0, outcome.err
    for part in ("predicted", "overhead", "small:0.5,large", "peak memory"):
        assert part in outcome.out


def test_members_that_paint_are_given_a_picture(tmp_path: Path) -> None:
    with tstitch_trt.load(World().bundle(tmp_path), threads=1) as runtime:
        found = measure(runtime, fractions=(0.0, 0.5), batch=2, repeats=1, warmup=0, steps=4, guidance=2.0)
    assert [trajectory.members for trajectory in found.trajectories] == [{"painter": 4}, {"plain": 2, "painter": 2}]
    assert {(member.name, member.guided) for member in found.members} >= {("painter", True), ("plain", True)}
    assert all(trajectory.ms > 0 for trajectory in found.trajectories)
