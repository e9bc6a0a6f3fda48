"""Calibrating a bundle, keeping the result, and knowing when it no longer holds. No time is compared with another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from PIL import Image

import tstitch_trt
from support.command import Command, refused
from support.studies import calibration
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.errors import NotCalibrated, OutOfProfile
from tstitch_trt.runtime.chooser import Setup
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.budget import Conditions, find_calibration, predict_ms
from tstitch_trt.study.budget.conditions import engine_digests
from tstitch_trt.study.calibrate.calibrate import calibrate, default_batches
from tstitch_trt.study.calibrate.trials import slots_of
from tstitch_trt.study.records import Calibration
from tstitch_trt.study.store import load_studies, save_study, weights_of


@pytest.fixture
def bundle(tiny_pair: TinyPair, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_pair.bundle, tmp_path / "pair.bundle")
    return open_bundle(tmp_path / "pair.bundle")


@pytest.fixture(scope="module")
def runtime(tiny_pair: TinyPair) -> Iterator[Runtime]:
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def measured(runtime: Runtime) -> Calibration:
    return calibrate(runtime, batches=[2, 6], repeats=2, checks=5, seed=3, command="again")


def holding(bundle: Bundle, **changes: object) -> Calibration:
    """A calibration that holds for ``bundle`` here on one thread, but for ``changes``."""
    fields = {
        "weights": weights_of(bundle.manifest),
        "engines": engine_digests(bundle, "onnxruntime", "cpu"),
    }
    return calibration(**(fields | changes))  # type: ignore[arg-type]


def test_every_kind_of_step_is_measured_at_every_batch(measured: Calibration, runtime: Runtime) -> None:
    kinds = [(cost.member, cost.guided, cost.batch) for cost in measured.steps]
    want = {(name, guided, batch) for name in ("small", "large") for guided, batch in
            ((False, 2), (True, 2), (False, 6))}  # fmt: skip
    assert set(kinds) == want
    assert len(kinds) == len(want)
    assert all(cost.ms > 0 and 0 < cost.p10_ms <= cost.p90_ms and cost.blocks >= 2 for cost in measured.steps)
    assert {(o.batch, o.height, o.width) for o in measured.overheads} == {(2, 8, 8), (6, 8, 8)}
    assert all(o.ms >= 0 and o.switch_ms >= 0 for o in measured.overheads)
    assert measured.weights == weights_of(runtime.manifest)
    assert measured.splitting == runtime.splitting
    assert (measured.backend, measured.device, measured.threads, measured.graph) == ("onnxruntime", "cpu", 1, "off")


def test_short_trajectories_have_several_turns_in_a_round() -> None:
    counts = slots_of([4000.0, 50.0, 50.0, 400.0])
    assert counts == [1, 12, 12, 3]
    assert sum(slots_of([50.0] * 10)) == 15  # nothing is long: half as many slots again
    assert slots_of([50.0, 90.0, 10000.0]) == [12, 12, 1]
    assert slots_of([7.0]) == [1]


def test_the_checks_are_compared_with_the_model(measured: Calibration, runtime: Runtime) -> None:
    assert len(measured.checks) == 5
    for check in measured.checks:
        plan = runtime.plan(
            schedule=check.schedule,
            steps=check.steps,
            guidance=check.guidance,
            guidance_interval=check.guidance_interval,
        )
        assert check.predicted_ms == pytest.approx(predict_ms(measured, plan, batch=check.batch))
        assert check.measured_ms > 0
        names = [part.partition(":")[0] for part in check.schedule.split(",")]
        assert all(before != after for before, after in pairwise(names))
        assert check.repeats >= 2
    errors = sorted(abs(check.predicted_ms / check.measured_ms - 1) for check in measured.checks)
    assert measured.median_error == pytest.approx(errors[2])
    assert measured.worst_error == pytest.approx(errors[-1])
    assert measured.upper_ratio > 0


def test_the_same_seed_draws_the_same_schedules(measured: Calibration, runtime: Runtime) -> None:
    again = calibrate(runtime, batches=[2, 6], repeats=1, checks=3, seed=3)
    assert [c.schedule for c in again.checks] == [c.schedule for c in measured.checks[:3]]
    other = calibrate(runtime, batches=[2], repeats=1, checks=3, seed=4)
    assert [c.schedule for c in again.checks] != [c.schedule for c in other.checks]


def test_default_batches_reach_from_one_to_the_most(runtime: Runtime) -> None:
    assert default_batches(runtime) == (1, 2, 4, 8)
    with pytest.raises(OutOfProfile, match=r"batch 9 .* allowed is 1 to 8"):
        calibrate(runtime, batches=[9])


def test_a_bundle_of_one_member_is_calibrated(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.alone("large"), threads=1) as alone:
        found = calibrate(alone, batches=[1], repeats=1, checks=1)
    assert [(cost.member, cost.guided) for cost in found.steps] == [("large", False), ("large", True)]
    assert found.overheads[0].switch_ms == 0


def here(threads: int) -> Conditions:
    return Conditions.here(Setup("onnxruntime", "cpu", threads, "off"))


def test_the_one_that_holds_is_found(bundle: Bundle) -> None:
    held = holding(bundle)
    save_study(bundle, held, key=Conditions.of(held).key)
    other = holding(bundle, threads=7, made="2026-01-01T00:00:00Z")
    save_study(bundle, other, key=Conditions.of(other).key)
    assert len(load_studies(bundle, Calibration)) == 2
    assert find_calibration(bundle, here(1)) == held
    assert find_calibration(bundle, here(7)) == other
    with tstitch_trt.load(bundle, threads=1) as runtime:
        assert find_calibration(bundle, Conditions.here(runtime.setup)) == held


def test_without_one_the_command_is_named(bundle: Bundle) -> None:
    with pytest.raises(NotCalibrated, match="has no calibration") as caught:
        find_calibration(bundle, here(3))
    assert caught.value.hint == f"run: tstitch-trt calibrate {bundle.root} --backend onnxruntime --threads 3"


def machine(**changes: object):  # type: ignore[no-untyped-def]
    return msgspec.structs.replace(calibration().machine, **changes)


def versions(**changes: str) -> dict[str, str]:
    return calibration().machine.versions | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine": machine(processor="Abacus 9")}, ["processor was Abacus 9 and is "]),
        ({"machine": machine(cores=999)}, ["cores was 999 and is "]),
        ({"machine": machine(versions=versions(onnxruntime="0.1"))}, ["onnxruntime was 0.1 and is "]),
        ({"backend": "torch"}, ["backend was torch and is onnxruntime"]),
        ({"device": "cuda:0"}, ["device was cuda:0 and is cpu"]),
        ({"threads": 4}, ["threads was 4 and is 1"]),
        ({"threads": 0}, ["threads was all cores and is 1"]),
        ({"graph": "step"}, ["graph was step and is off"]),
        (
            {"machine": machine(processor="Abacus 9"), "threads": 4},
            ["processor was Abacus 9 and is ", "threads was 4 and is 1"],
        ),
    ],
)
def test_another_machine_or_setting_is_named_and_not_used(
    bundle: Bundle, changes: dict[str, object], said: list[str]
) -> None:
    save_study(bundle, holding(bundle, **changes), key="x")
    with pytest.raises(NotCalibrated) as caught:
        find_calibration(bundle, here(1))
    for part in said:
        assert part in caught.value.message
    assert "calibrate" in caught.value.hint


@pytest.mark.parametrize(
    "same",
    [machine(load=99.0), machine(python="4.0"), machine(memory_bytes=1), machine(versions=versions(onnx="0.1"))],
)
def test_load_python_and_other_libraries_do_not_matter(bundle: Bundle, same: object) -> None:
    save_study(bundle, holding(bundle, machine=same), key="x")
    assert find_calibration(bundle, here(1)).machine == same


def test_gpus_matter_only_where_they_are_used() -> None:
    gpus = machine(gpus=("GPU, 1.2",))
    assert Conditions.of(calibration(machine=gpus)) == Conditions.of(calibration(machine=machine(gpus=())))
    there, here = (Conditions.of(calibration(machine=m, device="cuda:0")) for m in (gpus, machine(gpus=())))
    assert there.differences(here) == [("gpus and driver", "GPU, 1.2", "none")]


def test_other_weights_or_engines_make_it_stale(bundle: Bundle) -> None:
    held = holding(bundle)
    for changes, said in (
        ({"weights": held.weights | {"large": "f" * 64}}, "the weights of member 'large' was ffffffffffff and is"),
        ({"engines": held.engines | {"small": "e" * 64}}, "the engine of member 'small' was eeeeeeeeeeee and is"),
        ({"weights": {"small": held.weights["small"]}}, "member 'large' was nothing and is"),
    ):
        save_study(bundle, holding(bundle, **changes), key="x")
        with pytest.raises(NotCalibrated, match="is stale") as caught:
            find_calibration(bundle, here(1))
        assert said in caught.value.message


ARGS = ["--batch", "2", "--repeats", "1", "--checks", "2", "--threads", "1"]


def test_the_command_measures_keeps_and_draws(
    bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = Command(capfd)("calibrate", bundle.root, *ARGS, "--json", "--plot", tmp_path / "cost.png")
    assert outcome.code == 0, outcome.err
    (kept,) = load_studies(bundle, Calibration)
    assert msgspec.convert(outcome.json, Calibration) == kept
    assert (bundle.root / "studies" / f"calibration-{Conditions.of(kept).key}.json").is_file()
    assert kept.command.startswith("tstitch-trt calibrate pair.bundle --backend onnxruntime --threads 1 --batch 2")
    assert find_calibration(bundle, here(1)) == kept
    with Image.open(tmp_path / "cost.png") as image:
        assert image.size[0] > 1000
    again = Command(capfd)(*kept.command.replace("pair.bundle", str(bundle.root)).split()[1:])
    assert again.code == 0, again.err
    for part in ("overhead ms", "predicted ms", "error over 2 random schedules: median", "large"):
        assert part in again.out
    assert len(load_studies(bundle, Calibration)) == 1  # in place of the one before


def test_the_command_refuses_what_does_not_run(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    run = Command(capfd)
    refused(run("calibrate", bundle.root, "--batch", "1,99"), "batch 99", "1 to 8")
    refused(run("calibrate", bundle.root, "--batch", "x"), "'x'", "--batch 1,4,8")
    refused(run("calibrate", bundle.root, "--size", "64x64"), "height 64 is outside what was built")
    refused(run("calibrate", bundle.root, "--plot", "cost.pdf"), "--plot", ".png")


def test_interrupted_it_leaves_the_one_before(
    bundle: Bundle, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = holding(bundle)
    file = save_study(bundle, held, key=Conditions.of(held).key)
    before, sample, calls = file.read_bytes(), Runtime.sample, []

    def pressed(self: Runtime, **keywords: object) -> object:
        calls.append(1)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return sample(self, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "sample", pressed)
    assert Command(capfd)("calibrate", bundle.root, *ARGS).code == 130
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
