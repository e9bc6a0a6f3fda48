"""``evaluate``: resumable bit for bit, extended in place, and its numbers are those of the pictures it drew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import tstitch_trt
from support.command import Command, refused
from support.hand_made_parts import World
from support.scored import scored_bundle
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.errors import BadInput, Unavailable, UnknownName
from tstitch_trt.request.synthetic import PROMPTS
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.evaluate.evaluate import evaluate
from tstitch_trt.study.image_set import ImageSet, prompts_for
from tstitch_trt.study.quality.gaussian import frechet_distance, gaussian_of
from tstitch_trt.study.quality.network import FeatureNetwork
from tstitch_trt.study.quality.real_images import read_reference
from tstitch_trt.study.quality.scorer import Samples, Scorer, join
from tstitch_trt.study.records import Evaluation, Measure
from tstitch_trt.study.settings import fraction_settings, setting_of
from tstitch_trt.study.store import load_studies, save_study

ALL = ("fid", "kid", "precision", "recall", "accuracy", "psnr", "latent_error")


@pytest.fixture(scope="module")
def place(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_bundle(tiny_pair, tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def runtime(place: Path) -> Iterator[Runtime]:
    with tstitch_trt.load(place, threads=1) as runtime:
        yield runtime


def study(runtime: Runtime, work: Path, metrics: Any = ALL, samples: int = 150, **more: Any) -> Evaluation:
    scorer = Scorer.of(runtime.bundle, metrics, threads=1)
    settings = fraction_settings(
        runtime.manifest, (0.0, 0.5, 1.0), ("small-first", "large-first"), steps=4, guidance=1.0
    )
    options: dict[str, Any] = {"resamples": 30, "command": "a test", **more}
    return evaluate(runtime, scorer, options.pop("settings", settings), ImageSet(samples), work=work, **options)


def numbers(found: Evaluation) -> list[tuple[str, dict[str, Measure]]]:
    return [(point.setting.schedule, point.measures) for point in found.points]


class Stop:
    """Ctrl-C after some batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, phase: str, share: float) -> None:
        self.left -= ": " in phase  # a setting's batch
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3, 6])
def test_interrupted_and_continued_equals_uninterrupted(runtime: Runtime, tmp_path: Path, after: int) -> None:
    whole = study(runtime, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        study(runtime, tmp_path / "parts", progress=Stop(after))
    kept = list((tmp_path / "parts").rglob("*.npz"))
    assert len(kept) == after
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert numbers(study(runtime, tmp_path / "parts")) == numbers(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == before  # nothing was drawn twice


def test_more_samples_and_a_damaged_batch_give_what_a_fresh_study_gives(runtime: Runtime, tmp_path: Path) -> None:
    study(runtime, tmp_path / "grown", samples=100)
    files = sorted((tmp_path / "grown").rglob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert numbers(study(runtime, tmp_path / "grown")) == numbers(study(runtime, tmp_path / "fresh"))


def test_the_numbers_are_those_of_the_pictures(runtime: Runtime, tmp_path: Path) -> None:
    """From the pictures written and from direct runs, by the metrics' own functions."""
    (tmp_path / "npz").mkdir()
    found = study(runtime, tmp_path / "work", npz=tmp_path / "npz", samples=70)
    assert [point.setting.schedule for point in found.points] == [
        "large:4", "small:2,large:2", "small:4", "large:2,small:2",
    ]  # fmt: skip
    labels = [i % 10 for i in range(70)]
    wanted: dict[str, Any] = {"labels": labels, "seeds": list(range(70)), "steps": 4, "guidance": 1.0}
    alone = runtime.sample(schedule="large", **wanted)
    quality = runtime.manifest.quality
    assert quality is not None
    network = FeatureNetwork(runtime.bundle.path(quality.network), threads=1)
    reference = read_reference(runtime.bundle.path(quality.reference), network, picture=None)
    for point in found.points:
        drawn = runtime.sample(schedule=point.setting.schedule, **wanted)
        with np.load(tmp_path / "npz" / point.samples_file) as stored:
            np.testing.assert_array_equal(stored["arr_0"], drawn.images)
        assert drawn.images is not None
        features, logits = network.extract(drawn.images)
        assert logits is not None
        got = point.measures
        assert got["fid"].value == pytest.approx(frechet_distance(reference.gaussian, gaussian_of(features)), rel=1e-5)
        assert got["accuracy"].value == pytest.approx((logits.argmax(1) == labels).mean())
        errors = np.linalg.norm((drawn.latents - alone.latents).reshape(70, -1), axis=1)
        errors /= np.linalg.norm(alone.latents.reshape(70, -1), axis=1)
        assert got["latent_error"].value == pytest.approx(np.median(errors), rel=1e-4, abs=1e-12)
        if point.setting.schedule != "large:4":
            assert alone.images is not None
            mse = np.mean((drawn.images.astype(float) - alone.images.astype(float)) ** 2)
            assert got["psnr"].value == pytest.approx(10 * np.log10(255**2 / mse), rel=1e-6)
    assert "psnr" not in found.points[0].measures  # infinite
    assert found.points[0].measures["latent_error"].value == 0


def test_more_settings_and_metrics_extend_the_record(runtime: Runtime, tmp_path: Path) -> None:
    first = study(runtime, tmp_path, ("fid", "accuracy"), rounds=1, batch=2)
    save_study(runtime.bundle, first, key=first.key)
    extra = [setting_of(runtime.manifest, schedule=t, steps=4, guidance=1.0) for t in ("small:1,large:3", "large")]
    second = study(runtime, tmp_path, ("fid", "kid"), settings=extra)
    assert second.key == first.key
    save_study(runtime.bundle, second, key=second.key)
    (kept,) = load_studies(runtime.bundle, Evaluation)
    by_schedule = {point.setting.schedule: point for point in kept.points}
    assert set(by_schedule) == {"large:4", "small:2,large:2", "small:4", "large:2,small:2", "small:1,large:3"}
    assert set(by_schedule["large:4"].measures) == {"fid", "kid", "accuracy"}
    assert set(by_schedule["small:1,large:3"].measures) == {"fid", "kid"}
    assert by_schedule["large:4"].ms > 0
    assert kept.metrics == ("fid", "kid", "accuracy")
    other = study(runtime, tmp_path, ("fid",), samples=151, settings=extra)
    save_study(runtime.bundle, other, key=other.key)
    assert len(load_studies(runtime.bundle, Evaluation)) == 2
    shutil.rmtree(runtime.bundle.root / "studies")


def test_an_evaluation_of_other_weights_is_not_extended(runtime: Runtime, tmp_path: Path) -> None:
    first = study(runtime, tmp_path, ("fid",))
    save_study(runtime.bundle, msgspec.structs.replace(first, weights={"small": "x", "large": "y"}), key=first.key)
    extra = [setting_of(runtime.manifest, schedule="small:1,large:3", steps=4, guidance=1.0)]
    assert len(study(runtime, tmp_path, ("fid",), settings=extra).points) == 1
    shutil.rmtree(runtime.bundle.root / "studies")


def test_few_samples_are_said_with_their_bias(runtime: Runtime, tmp_path: Path) -> None:
    (note,) = study(runtime, tmp_path, ("fid",), samples=24).notes
    assert "24 samples are few for 4 features (80 would do): fid is biased upwards, by about " in note
    assert study(runtime, tmp_path, ("fid",), samples=80).notes == ()


def test_the_bias_said_is_what_more_samples_take_away(runtime: Runtime) -> None:
    scorer = Scorer.of(runtime.bundle, "fid", threads=1)
    rng = np.random.default_rng(0)
    biases, excess = [], []
    for _ in range(200):
        features = rng.standard_normal((40, 4)).astype(np.float32)
        biases.append(scorer.bias(features))
        excess.append(scorer.measure({"features": features}, resamples=2).value)
    many = rng.standard_normal((100_000, 4)).astype(np.float32)
    truth = scorer.measure({"features": many}, resamples=2).value
    assert np.mean(biases) == pytest.approx(np.mean(excess) - truth, rel=0.6)


def test_classes_that_go_round_do_not_count_as_bias(runtime: Runtime) -> None:
    """Every second sample of labels 0, 1, 0, 1... is of one class, which is no small sample of both."""
    scorer = Scorer.of(runtime.bundle, "fid", threads=1)
    rng = np.random.default_rng(0)
    classes = np.arange(400) % 2
    features = (rng.standard_normal((400, 4)) + 20 * classes[:, None]).astype(np.float32)
    shuffled = features[rng.permutation(400)]
    assert scorer.bias(features) == pytest.approx(scorer.bias(shuffled), abs=20)  # about 400 if taken by turns


# --- scorer


def test_a_scorer_for_a_search(place: Path) -> None:
    scorer = Scorer.of(open_bundle(place), metric="fid", threads=1)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 4), np.uint8)
    seen = join([scorer.extract(images[:16]), scorer.extract(images[16:])])
    whole = scorer.measure(scorer.extract(images))
    assert scorer.measure(seen).value == pytest.approx(whole.value, rel=1e-5)
    assert whole.low <= whole.value <= whole.high
    assert not scorer.paired


def test_psnr_of_pairs_that_are_mostly_equal_has_a_finite_interval() -> None:
    scorer = Scorer(("psnr",))
    measure = scorer.measure({"squared_error": np.array([0.0] * 7 + [2.0])})
    assert measure.value == pytest.approx(10 * np.log10(255**2 / 0.25))
    assert np.isfinite([measure.low, measure.high, measure.std]).all()
    assert measure.low <= measure.value <= measure.high
    assert scorer.measures({"squared_error": np.zeros(8)}) == {}


@pytest.mark.parametrize(
    ("metrics", "words", "hint"),
    [
        (["fidd"], "unknown metric 'fidd'", "did you mean 'fid'"),
        ([], "no metric", "fid"),
        (["lpips"], "lpips needs a network", "--lpips FILE"),
        (["clip"], "draws classes", "leave clip out"),
    ],
)
def test_metrics_that_can_not_be(place: Path, metrics: list[str], words: str, hint: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        Scorer.of(open_bundle(place), metrics)
    assert hint in caught.value.hint


def test_a_bundle_without_a_quality_network(tiny_pair: TinyPair, tmp_path: Path) -> None:
    bundle = open_bundle(tiny_pair.bundle)
    with pytest.raises(Unavailable, match="accuracy needs a classifier"):
        Scorer.of(bundle, "accuracy")
    with pytest.raises(Unavailable, match="no feature network for fid"):
        Scorer.of(bundle, "fid")
    network = tmp_path / "net.pt"
    torch.jit.script(_Means()).save(str(network))
    with pytest.raises(Unavailable, match="no reference"):
        Scorer.of(bundle, "fid", features=network)
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 4), np.uint8))
    scorer = Scorer.of(bundle, ("fid", "recall"), features=network, reference=tmp_path / "real.npz")
    assert scorer.reference is not None
    assert scorer.reference.count == 30


class _Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def test_a_reference_of_other_features_or_statistics_alone(place: Path, tmp_path: Path) -> None:
    bundle = open_bundle(place)
    np.savez(tmp_path / "mu.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(BadInput, match=r"mu.npz is of 7 features; .* gives 4"):
        Scorer.of(bundle, "fid", reference=tmp_path / "mu.npz")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(4), sigma=np.eye(4))
    Scorer.of(bundle, "fid", reference=tmp_path / "mu.npz")
    with pytest.raises(Unavailable, match="precision needs the features of real pictures"):
        Scorer.of(bundle, ("fid", "precision"), reference=tmp_path / "mu.npz")


def test_what_looking_needs_is_asked_for(place: Path) -> None:
    bundle = open_bundle(place)
    images = np.zeros((2, 8, 8, 4), np.uint8)
    with pytest.raises(BadInput, match="labels"):
        Scorer.of(bundle, "accuracy").extract(images)
    with pytest.raises(BadInput, match="large member"):
        Scorer.of(bundle, "psnr").extract(images)
    with pytest.raises(BadInput, match="latents"):
        Scorer.of(bundle, "latent_error").extract(images, against=Samples(images, np.zeros((2, 4, 8, 8), np.float32)))
    with pytest.raises(UnknownName, match="metric"):
        Scorer.of(bundle, "psnr").measure({}, "fid")


# --- what it shows


def test_fewer_steps_are_compared_with_the_most_and_not_with_themselves(runtime: Runtime, tmp_path: Path) -> None:
    """Each step count against itself would have no error at all. Of other solvers and scales each has its own most."""
    make = partial(setting_of, runtime.manifest, guidance=1.0)
    few = [make(schedule=text, steps=steps) for text in ("large", "small:0.5,large") for steps in (2, 4)]
    settings = [*few, make(schedule="large", steps=3, solver="dpmpp-2m")]
    found = study(runtime, tmp_path, ("latent_error", "psnr"), samples=20, settings=settings)
    assert [(r.solver, r.steps, r.schedule) for r in found.references] == [
        ("ddim", 4, "large:4"), ("dpmpp-2m", 3, "large:3"),
    ]  # fmt: skip
    labels, seeds = [i % 10 for i in range(20)], list(range(20))

    def latents(schedule: str, steps: int) -> Any:
        wanted: dict[str, Any] = {"steps": steps, "solver": "ddim", "guidance": 1.0, "decode": False}
        drawn = runtime.sample(labels=labels, seeds=seeds, schedule=schedule, **wanted)
        return drawn.latents.astype(np.float64).reshape(20, -1)

    want = latents("large", 4)
    for point in found.points[:4]:
        got = latents(point.setting.schedule, point.setting.steps)
        errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
        assert point.measures["latent_error"].value == pytest.approx(np.median(errors), rel=1e-4, abs=1e-12)
        assert (point.measures["latent_error"].value == 0) == (point.setting.schedule == "large:4")
    assert "psnr" in found.points[0].measures


def test_an_extension_by_more_steps_drops_what_was_compared_with_fewer(runtime: Runtime, tmp_path: Path) -> None:
    both, make = ("fid", "latent_error"), partial(setting_of, runtime.manifest, guidance=1.0)
    first = study(runtime, tmp_path, both, samples=20, settings=[make(schedule="small", steps=2)])
    save_study(runtime.bundle, first, key=first.key)
    fewer = study(runtime, tmp_path, both, samples=20, settings=[make(schedule="small:1,large", steps=2)])
    assert [set(point.measures) for point in fewer.points] == [{"fid", "latent_error"}] * 2
    more = study(runtime, tmp_path, both, samples=20, settings=[make(schedule="large", steps=4)])
    assert [set(point.measures) for point in more.points] == [{"fid", "latent_error"}, {"fid"}]
    save_study(runtime.bundle, more, key=more.key)
    again = study(runtime, tmp_path, both, samples=20, settings=[make(schedule="large", steps=2)])
    assert again.references == more.references
    assert again.points[0].measures["latent_error"].value > 0
    shutil.rmtree(runtime.bundle.root / "studies")


def test_settings_of_other_resamples_are_not_mixed(runtime: Runtime, tmp_path: Path) -> None:
    """Their deviations are not of the same draws, so that no two of them could be compared."""
    make = partial(setting_of, runtime.manifest, guidance=1.0, steps=2)
    first = study(runtime, tmp_path, ("fid",), samples=20, settings=[make(schedule="large")])
    save_study(runtime.bundle, first, key=first.key)
    found = [
        study(runtime, tmp_path, ("fid",), samples=20, settings=[make(schedule="small")], resamples=count)
        for count in (first.resamples, 40)
    ]
    shutil.rmtree(runtime.bundle.root / "studies")
    assert [len(one.points) for one in found] == [2, 1]


def test_the_differences_of_an_evaluation_are_paired_by_seed(runtime: Runtime, tmp_path: Path) -> None:
    """A second evaluation that extends the first can be compared with it: resamples draw the same seeds."""
    make = partial(setting_of, runtime.manifest, guidance=1.0, steps=4)
    first = study(runtime, tmp_path, ("fid",), settings=[make(schedule="large")])
    save_study(runtime.bundle, first, key=first.key)
    both = study(runtime, tmp_path, ("fid",), settings=[make(schedule="small:1,large")])
    shutil.rmtree(runtime.bundle.root / "studies")
    (claim,) = claims_of(both, ("small", "large"))
    scorer = Scorer.of(runtime.bundle, "fid", threads=1)
    drawn = [
        runtime.sample(
            labels=[i % 10 for i in range(150)], seeds=list(range(150)), guidance=1.0, steps=4, schedule=text
        )
        for text in ("small:1,large", "large")
    ]
    features = [scorer.extract(one.images) for one in drawn]
    found = claim.trials[0].judgement
    assert found is not None
    gap, std = scorer.estimate(features[0], resamples=30).minus(scorer.estimate(features[1], resamples=30))
    assert found.difference == pytest.approx(gap, rel=1e-4, abs=1e-6)
    assert found.upper - found.difference == pytest.approx(1.645 * std, rel=0.05, abs=1e-6)


# --- text bundles


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("world"))


def test_a_text_bundle_is_drawn_from_prompts(world: Bundle, tmp_path: Path) -> None:
    """Members that paint too; the pairs compare with the last member alone."""
    prompts = ("a red fox", "blue sky", "a bear")
    with tstitch_trt.load(world, threads=1) as runtime:
        assert prompts_for(runtime.manifest, ()) == PROMPTS
        settings = [
            setting_of(runtime.manifest, schedule=text, steps=3, guidance=2.0)
            for text in ("plain:1,painter", "painter")
        ]
        scorer = Scorer.of(runtime.bundle, ("psnr", "latent_error"))
        found = evaluate(
            runtime, scorer, settings, ImageSet(5, 7, prompts), work=tmp_path, resamples=10, command="a test"
        )
        assert found.prompts == prompts
        assert found.points[0].measures["latent_error"].value > 0
        assert found.points[1].measures["latent_error"].value == 0


def test_prompts_are_for_bundles_that_read_them(runtime: Runtime) -> None:
    assert prompts_for(runtime.manifest, ()) == ()
    with pytest.raises(BadInput, match="draws classes"):
        prompts_for(runtime.manifest, ["a fox"])


# --- the command


def test_the_command_prints_a_table_and_draws(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = [
        "evaluate",
        place,
        "--steps",
        "4,5",
        "--samples",
        "24",
        "--threads",
        "1",
        "--resamples",
        "10",
        "--time",
        "1",
    ]
    args += ["--fractions", "0,0.5,1", "--work", tmp_path / "work", "--batch", "2", "--guidance", "1"]
    outcome = Command(capfd)(*args, "--plot", tmp_path / "plot.png", "--npz", tmp_path / "npz")
    assert outcome.code == 0, outcome.err
    assert "small:2,large:2" in outcome.out
    assert "not enough samples to say if 50% of the steps on 'small' is as good as 'large'" in outcome.out
    assert "times as fast" not in outcome.out
    assert "24 samples are few for 4 features" in outcome.out
    assert len(list((tmp_path / "npz").glob("ddim-*.npz"))) == 8
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size[0] > 1000
    again = Command(capfd)(*args, "--schedule", "small:1,large", "--metrics", "fid", "--json")
    assert again.code == 0, again.err
    said = again.json
    assert len(said["points"]) == 10
    assert [claim["fraction"] for claim in said["claims"]] == [None, None]
    assert all("not enough samples" in claim["text"] for claim in said["claims"])
    assert set(said["points"][0]["measures"]) >= {"fid", "kid", "precision", "recall", "accuracy", "latent_error"}
    assert said["points"][0]["ms"] > 0
    assert load_studies(open_bundle(place), Evaluation)[0].command.startswith("tstitch-trt")
    shutil.rmtree(place / "studies")


def test_a_bundle_from_before_there_were_features(
    tiny_pair: TinyPair, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its reference has statistics alone: what can be measured is, and the rest is named."""
    old = scored_bundle(tiny_pair, tmp_path, features=False)
    args = [
        "evaluate",
        old,
        *["--steps", "2", "--samples", "8", "--threads", "1", "--resamples", "5", "--time", "0", "--fractions", "0"],
    ]
    outcome = Command(capfd)(*args, "--work", tmp_path / "work", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["metrics"] == ["fid", "latent_error", "accuracy", "psnr"]
    assert "kid, precision and recall are left out: reference.npz" in outcome.err
    refused(Command(capfd)(*args, "--metrics", "kid"), "kid needs the features of real pictures", "--reference")


def test_the_built_in_pair_has_all_that_metrics_of_real_pictures_need(
    fashion_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "fashion.bundle"
    shutil.copytree(fashion_bundle, place)
    args = [
        "evaluate",
        place,
        *["--steps", "2", "--samples", "12", "--threads", "1", "--resamples", "5", "--time", "0", "--fractions", "0,1"],
    ]
    outcome = Command(capfd)(*args, "--orders", "small-first", "--guidance", "1", "--work", tmp_path / "work", "--json")
    assert outcome.code == 0, outcome.err
    assert [point["setting"]["schedule"] for point in outcome.json["points"]] == ["large:2", "small:2"]
    assert set(outcome.json["points"][1]["measures"]) == set(ALL)
    assert outcome.json["reference"]["count"] == 10_000


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--metrics", "fdi"], ["unknown metric 'fdi'", "did you mean 'fid'"]),
        (["--solver", "dimm"], ["unknown solver 'dimm'"]),
        (["--orders", "large"], ["unknown order 'large'"]),
        (["--schedule", "smal:0.5,large"], ["unknown member 'smal'"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--margin", "0"], ["--margin 0", "0.05"]),
        (["--margin", "5"], ["--margin is 5", "from 0 to 1"]),
        (["--features-option", "siez=3"], ["'siez'", "'size'"]),
        (["--reference", "none.npz"], ["none.npz does not exist"]),
        (["--lpips", "none.pt", "--metrics", "lpips"], ["none.pt does not exist"]),
        (["--plot", "plot.jpg"], [".png"]),
        (["--lpips", "net.pt", "--metrics", "fid"], ["--lpips was given", "none of the metrics fid"]),
        (["--reference", "real.npz", "--metrics", "psnr"], ["--reference was given"]),
        (["--features-option", "size=3"], ["without --features"]),
    ],
)
def test_bad_input(place: Path, args: list[str], parts: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    refused(Command(capfd)("evaluate", place, "--samples", "2", "--threads", "1", *args), *parts)
