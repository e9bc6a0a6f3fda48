"""search: measured against plain sampling, resumed, limited in time, and refused where it can't be right."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.command import Command, refused
from support.studies import calibration, overhead, step_cost
from support.tiny import TinyPair
from tstitch_engines.bundle.identity import digest
from tstitch_engines.errors import BadInput, NotCalibrated
from tstitch_trt import Runtime
from tstitch_trt.study.budget import Conditions, predict_ms
from tstitch_trt.study.budget.conditions import engine_digests
from tstitch_trt.study.noninferiority import bounds_of
from tstitch_trt.study.quality.scorer import Scorer
from tstitch_trt.study.records import Search, SearchPoint
from tstitch_trt.study.search.racing import front
from tstitch_trt.study.search.search import search, usual_metric
from tstitch_trt.study.settings import options_of
from tstitch_trt.study.store import load_studies, save_study, weights_of

SMALL: dict[str, Any] = {"steps": [4, 2], "samples": 20, "fractions": (0.5,), "seed": 3}


def calibrated(source: Path, target: Path, *, size: tuple[int, int]) -> Path:
    """A copy of a bundle, with a calibration made by hand: a large step costs ten times a small one."""
    shutil.copytree(source, target)
    with tstitch_trt.load(target, threads=1) as runtime:
        study = calibration(
            weights=weights_of(runtime.manifest),
            engines=engine_digests(runtime.bundle, "onnxruntime", "cpu"),
            splitting=runtime.splitting,
            steps=tuple(
                step_cost(name, batch, ms * batch, guided=guided, size=size)
                for name, ms in (("small", 1.0), ("large", 10.0))
                for batch in (1, 8)
                for guided in (False, True)
            ),
            overheads=(overhead(1, 0.5, size=size), overhead(8, 0.5, size=size)),
        )
        save_study(runtime.bundle, study, key=Conditions.here(runtime.setup).key)
    return target


@pytest.fixture(scope="module")
def bundle(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tiny_pair.bundle, tmp_path_factory.mktemp("search") / "pair.bundle", size=(8, 8))


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[Runtime]:
    with tstitch_trt.load(bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tstitch_trt.study.evaluate.drawing._CHUNK", 8)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def run(runtime: Runtime, work: Path, **changes: Any) -> Search:
    return search(runtime, Scorer.of(runtime.bundle, "latent_error"), work=work, **{**SMALL, **changes})


def values(study: Search) -> list[tuple[SearchPoint, ...]]:
    return [msgspec.structs.astuple(point) for point in study.points]


def test_points_are_what_plain_sampling_gives(runtime: Runtime, tmp_path: Path) -> None:
    study = run(runtime, tmp_path, solvers=["ddim", "dpmpp-2m"], guidance=1.0)
    labels, seeds = [i % 10 for i in range(20)], [3 + i for i in range(20)]

    def latents(**settings: Any) -> np.ndarray:
        return runtime.sample(labels=labels, seeds=seeds, decode=False, **settings).latents.astype(np.float64)

    reference = latents(steps=4, solver="ddim", schedule="large", guidance=1.0)
    (known,) = load_studies(runtime.bundle, type(calibration()))
    assert study.calibration == digest(known)
    assert len(study.points) == 2 * (4 + 3)  # of 2 steps there is no large-small-large
    for point in study.points:
        found = latents(**options_of(point.setting).explicit())[: point.samples]
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, reference, strict=False)]
        assert point.quality.value == pytest.approx(np.median(errors), rel=1e-5, abs=1e-12)
        assert point.cost_ms == predict_ms(known, runtime.plan(**options_of(point.setting).explicit()), batch=8)
        assert point.samples == 20 or point.dropped
    whole = [point for point in study.points if not point.dropped]
    bounds = bounds_of(
        [point.setting for point in whole], [point.quality for point in whole], "latent_error", whole[0].quality, ()
    )
    assert [point.front for point in whole] == front([*zip((p.cost_ms for p in whole), bounds, strict=True)])
    assert not any(point.front for point in study.points if point.dropped)
    ends = next(p for p in study.points if p.setting.schedule == "large:4" and p.setting.solver == "ddim")
    assert (ends.kind, ends.quality.value, ends.front) == ("fewer steps", 0.0, True)
    assert "latent_error is the distance from one solution: large:4 in 4 ddim steps" in study.notes


def test_an_interrupted_search_goes_on_and_ends_the_same(runtime: Runtime, tmp_path: Path) -> None:
    whole = run(runtime, tmp_path / "whole", guidance=2.0)
    drawn = 0

    def interrupt(text: str, share: float) -> None:
        nonlocal drawn
        drawn += ": " in text  # a candidate's chunk
        if drawn == 9:  # of 7 candidates: in the second round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(runtime, tmp_path / "parts", guidance=2.0, progress=interrupt)
    kept = {path: path.read_bytes() for path in (tmp_path / "parts").rglob("*.npz")}
    assert len(kept) == 9
    resumed = run(runtime, tmp_path / "parts", guidance=2.0)
    assert values(resumed) == values(whole)
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_what_was_drawn_is_not_drawn_again(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run(runtime, tmp_path, guidance=1.0)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("drawn again")

    with monkeypatch.context() as patched:
        patched.setattr("tstitch_trt.study.evaluate.drawing.draw_settings", refuse)
        assert values(run(runtime, tmp_path, guidance=1.0)) == values(study)
        with pytest.raises(AssertionError, match="drawn again"):
            run(runtime, tmp_path, guidance=1.0, seed=4)  # other samples
    more = run(runtime, tmp_path, guidance=1.0, samples=28)
    assert more.samples == 28


def test_time_that_runs_out_is_said(runtime: Runtime, tmp_path: Path) -> None:
    study = run(runtime, tmp_path, guidance=1.0, budget_s=1e-9)
    assert study.samples == 8
    assert any("time ran out at 8 of 20 samples" in note for note in study.notes)
    assert all(point.samples == 8 for point in study.points)


def test_few_trials(runtime: Runtime, tmp_path: Path) -> None:
    shares: list[float] = []
    study = run(runtime, tmp_path, guidance=1.0, trials=3, progress=lambda text, share: shares.append(share))
    assert len(study.points) == 3
    assert "large:4" in [point.setting.schedule for point in study.points]
    assert any("4 more candidates were left out" in note for note in study.notes)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_bad_input(runtime: Runtime, tiny_pair: TinyPair, tmp_path: Path) -> None:
    for changes, words in (
        ({"samples": 4}, "4 samples"),
        ({"trials": 0}, "0 candidates"),
        ({"budget_s": 0.0}, "0 minutes"),
        ({"steps": [0]}, "0 steps"),
        ({"prompts": ["a fox"]}, "draws classes"),
    ):
        with pytest.raises(BadInput) as caught:
            run(runtime, tmp_path, **changes)  # type: ignore[arg-type]
        assert words in caught.value.message
        assert caught.value.hint
    with (
        tstitch_trt.load(tiny_pair.alone("large"), threads=1) as alone,
        pytest.raises(BadInput, match="one member"),
    ):
        run(alone, tmp_path)
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as other, pytest.raises(NotCalibrated) as caught:
        run(other, tmp_path)
    assert "tstitch-trt calibrate" in caught.value.hint
    assert not list(tmp_path.rglob("*.npz"))


# --- the command


def test_the_command(bundle: Path, command: Command, tmp_path: Path) -> None:
    plot = tmp_path / "search.png"
    words = ["search", bundle, "--steps", "2,4", "--samples", 16, "--fractions", "0.5", "--threads", 1]
    words += ["--work", tmp_path / "work"]
    done = command(*words, "--plot", plot, "--json")
    assert done.code == 0, done.err
    assert done.json["metric"] == "latent_error"
    with Image.open(plot) as picture:
        assert picture.size[0] > 400
    with tstitch_trt.load(bundle, threads=1) as runtime:
        (kept,) = load_studies(runtime.bundle, Search)
    assert [p["cost_ms"] for p in done.json["points"]] == [p.cost_ms for p in kept.points]
    again = command(*shlex.split(kept.command)[1:], "--json")
    assert again.json["points"] == done.json["points"]
    table = command(*words)
    assert "large-small-large" in table.out
    assert "fewer steps" in table.out


def test_the_built_in_pair_is_searched_by_fid(fashion_bundle: Path, command: Command, tmp_path: Path) -> None:
    place = calibrated(fashion_bundle, tmp_path / "fashion.bundle", size=(28, 28))
    with tstitch_trt.load(place, threads=1) as runtime:
        assert usual_metric(runtime.manifest) == "fid"
    done = command(
        "search", place, "--steps", 2, "--samples", 16, "--fractions", "0.5", "--guidance", 1, "--threads", 1,
        "--work", tmp_path / "work", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {p["setting"]["schedule"] for p in done.json["points"]} == {"large:2", "small:2", "small:1,large:1"}
    assert all(p["quality"]["low"] <= p["quality"]["value"] <= p["quality"]["high"] for p in done.json["points"])
    assert any("biased" in note for note in done.json["notes"])
    told = "no schedule can be told from large:2 in 2 ddim steps by fid: 16 samples are not enough"
    assert any(note.startswith(told) for note in done.json["notes"])
    assert done.json["margin"] == 0.05


def test_bad_words(bundle: Path, tiny_pair: TinyPair, command: Command, tmp_path: Path) -> None:
    words = ["search", bundle, "--work", tmp_path]
    refused(command(*words, "--metric", "fdi"), "'fdi'", "fid")
    refused(command(*words, "--metric", "psnr"), "psnr", "latent_error")
    refused(command(*words, "--metric", "fid"), "no feature network")
    refused(command(*words, "--samples", 4), "4 samples", "16")
    refused(command(*words, "--margin", 0), "--margin 0", "0.05")
    refused(command(*words, "--trials", 0, "--threads", 1), "0 candidates", "--trials 20")
    refused(command(*words, "--budget-minutes", 0, "--threads", 1), "0 minutes")
    refused(command(*words, "--solvers", "dimm", "--threads", 1), "dimm", "ddim")
    refused(command("search", tiny_pair.alone("small"), "--threads", 1), "one member")
    refused(command("search", tiny_pair.bundle, "--threads", 1), "no calibration", "tstitch-trt calibrate")
