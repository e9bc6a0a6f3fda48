"""Non-inferiority on simulated features whose true difference is known: errors, power, pairs; what is not claimed."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from support.studies import evaluation, measure, setting
from tstitch_engines.errors import BadInput
from tstitch_trt.study.evaluate.claim import Claim, claims_of
from tstitch_trt.study.noninferiority import Judgement, bounds_of, check_margin, judge, margin_of
from tstitch_trt.study.quality.gaussian import Gaussian
from tstitch_trt.study.quality.real_images import Reference
from tstitch_trt.study.quality.scorer import Scorer
from tstitch_trt.study.records import Measure

WIDTH = 3
REAL = Reference("real", "0" * 64, 0, Gaussian(np.zeros(WIDTH), np.eye(WIDTH), 10_000), None)
SCORER = Scorer(("fid",), reference=REAL)
CLIP = Scorer(("clip",))
MARGIN = 0.05


def drawn(rng: np.random.Generator, count: int, worse: float, own: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features of the large member, at the distance 1, and of a schedule at 1 + ``worse``, from the same seeds.

    ``own``: the part of a sample that the schedule changes.
    """
    noise, other = rng.standard_normal((2, count, WIDTH))
    mean = np.eye(WIDTH)[0]
    return mean + noise, math.sqrt(1 + worse) * mean + math.sqrt(1 - own**2) * noise + own * other


def by_fid(features: NDArray[Any]) -> Measure:
    return SCORER.measure({"features": features.astype(np.float32)}, resamples=60)


def test_what_is_worse_by_the_margin_passes_in_one_study_of_twenty() -> None:
    verdicts = []
    for seed in range(150):
        large, schedule = drawn(np.random.default_rng(seed), 250, MARGIN, 0.1)
        found = judge("fid", by_fid(schedule), by_fid(large), samples=250, margin=MARGIN)
        assert found is not None
        verdicts.append(found.verdict)
    assert verdicts.count("no worse") / 150 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    assert "too few samples" not in verdicts


@pytest.mark.parametrize(("worse", "least", "most"), [(0.0, 0.7, 0.9), (MARGIN, 0.0, 0.09)])
def test_the_samples_it_asks_for_are_enough_for_equal_settings(worse: float, least: float, most: float) -> None:
    """A score of one number per sample, 1 on average, of which larger is better."""

    def verdict(seed: int, count: int) -> Judgement:
        shared, own = np.random.default_rng(seed).standard_normal((2, count))
        large, other = 1 + 0.5 * shared, 1 - worse + 0.5 * shared + 0.3 * own
        measures = [CLIP.measure({"clip": values}, resamples=100) for values in (other, large)]
        found = judge("clip", *measures, samples=count, margin=MARGIN)
        assert found is not None
        return found

    exact = math.ceil((2.486 * 0.3 / MARGIN) ** 2)  # the normal quantiles of 0.95 and 0.8, added
    pilot = verdict(10_000, 50)
    assert pilot.verdict == "too few samples"
    assert pilot.needed == pytest.approx(exact, rel=0.5)
    passed = np.mean([verdict(seed, exact).verdict == "no worse" for seed in range(300)])
    assert least <= passed <= most


def test_pairs_tell_what_samples_of_other_seeds_do_not() -> None:
    rng = np.random.default_rng(1)
    large, schedule = drawn(rng, 400, 0.0, 0.05)
    other, _ = drawn(rng, 400, 0.0, 0.05)
    paired = judge("fid", by_fid(schedule), by_fid(large), samples=400, margin=MARGIN)
    apart = judge("fid", by_fid(other), by_fid(large), samples=400, margin=MARGIN)
    assert paired is not None
    assert apart is not None
    assert paired.verdict == "no worse"
    assert apart.verdict == "too few samples"
    assert apart.upper - apart.difference > 5 * (paired.upper - paired.difference)


def test_the_difference_is_that_of_the_resamples_as_numbers() -> None:
    """Records keep deviations in half precision: of two settings that hardly differ the spread is still right."""
    rng = np.random.default_rng(2)
    large, schedule = (
        SCORER.estimate({"features": f.astype(np.float32)}, resamples=200) for f in drawn(rng, 300, 0.0, 0.01)
    )
    found = judge("fid", schedule.measure, large.measure, samples=300, margin=MARGIN)
    assert found is not None
    gap, std = schedule.minus(large)
    assert found.difference == gap
    assert found.upper == pytest.approx(gap + stats.t.ppf(0.95, 199) * std, abs=0.02 * std)


def test_few_resamples_widen_the_bound() -> None:
    pair = [of_ten_resamples(size) for size in (20.0, 20.5)]
    found = judge("fid", *pair, samples=1000, margin=MARGIN)
    assert found is not None
    a, b = (np.frombuffer(one.deviations, "<f2").astype(float) * one.std for one in pair)
    want = stats.t.ppf(0.95, 9) * (a - b).std(ddof=1)
    assert found.upper - found.difference == pytest.approx(want, rel=0.02)


def of_ten_resamples(value: float) -> Measure:
    """One of ten resamples."""
    return msgspec.structs.replace(measured := measure(value, own=0.5), deviations=measured.deviations[:20])


@pytest.mark.parametrize("metric", ["fid", "clip", "accuracy"])
def test_sixteen_samples_claim_nothing(metric: str) -> None:
    """Not even of settings that agree in every sample."""
    scorer = Scorer((metric,), reference=REAL)
    rng = np.random.default_rng(3)
    features = {"features": drawn(rng, 16, 0, 0.01)[0].astype(np.float32), "clip": np.ones(16), "correct": np.ones(16)}
    same = scorer.measure(features)
    points = {text: {metric: same} for text in ("large:10", "small:5,large:5", "small:10")}
    (claim,) = claims_of(evaluation(points, samples=16), ("small", "large"))
    assert claim.fraction is None
    assert claim.speedup == 0
    text = claim.text("small", "large", metric)
    assert "not enough samples to say if 50% of the steps on small is as good as large" in text
    assert "times as fast" not in text
    assert "up to" not in text


def claim_of(values: dict[str, float | Measure], *, samples: int = 1000, metric: str = "fid") -> Claim:
    (found,) = claims_of(evaluation({k: {metric: v} for k, v in values.items()}, samples=samples), ("small", "large"))
    return found


def test_the_first_fraction_that_fails_ends_it() -> None:
    """50 % would pass again. 30 % of 20 is not within 1."""
    values = {
        "large:10": 20.0,
        "small:1,large:9": 20.1,
        "small:2,large:8": 19.5,
        "small:3,large:7": 21.5,
        "small:5,large:5": 20.1,
        "small:10": 60.0,
    }
    claim = claim_of(values)
    assert claim.fraction == 0.2
    assert [trial.passes for trial in claim.trials] == [True, True, False, True, False]
    assert claim.stopped is not None
    assert claim.stopped.fraction == 0.3
    assert "up to 20% of the steps on small" in claim.text("small", "large", "fid")
    assert "at 30% of the steps on small the fid is worse (+1.5, at most +1.5; margin 1)" in claim.text(
        "small", "large", "fid"
    )
    assert claim_of({"large:10": 20.0, "small:5,large:5": 21.5}).fraction is None
    assert claim_of({"large:10": 20.0, "small:5,large:5": 20.1, "small:10": 20.2}).fraction == 1.0


def test_a_fraction_whose_samples_are_too_few_ends_it_with_the_number_that_would_do() -> None:
    wide = measure(20.1, std=2.0, own=0.9)
    claim = claim_of(
        {"large:10": measure(20.0, std=2.0), "small:2,large:8": measure(20.2, std=2.0), "small:6,large:4": wide}
    )
    assert claim.fraction == 0.2
    assert claim.stopped is not None
    found = claim.stopped.judgement
    assert found is not None
    assert found.verdict == "too few samples"
    half = found.upper - found.difference
    assert half > 1.0
    assert found.needed == pytest.approx(1000 * (half * 2.486 / 1.645 / 1.0) ** 2, rel=0.01)
    assert f"about {found.needed:,} would do" in claim.text("small", "large", "fid")


def test_the_bias_of_few_samples_does_not_widen_the_margin() -> None:
    assert margin_of(measure(60.0, bias=40.0), 0.05) == pytest.approx(1.0)
    assert margin_of(measure(60.0, bias=60.0), 0.05) == 0
    claim = claim_of({"large:10": measure(60.0, bias=60.0), "small:5,large:5": measure(60.0, bias=60.0)})
    assert claim.fraction is None
    assert "many more than 1,000" in claim.text("small", "large", "fid")


@pytest.mark.parametrize("metric", ["precision", "recall", "accuracy"])
def test_a_rate_that_did_not_change_in_any_sample_may_still_have_changed_in_three_of_all(metric: str) -> None:
    found = judge(metric, measure(0.8), measure(0.8), samples=100, margin=0.02)
    assert found is not None
    assert (found.difference, found.upper, found.verdict) == (0, 0.03, "too few samples")


def test_higher_is_better_is_the_other_way_round() -> None:
    found = judge("clip", measure(0.28), measure(0.30), samples=1000, margin=0.05)
    assert found is not None
    assert (found.verdict, round(found.difference, 3), round(found.margin, 4)) == ("worse", 0.02, 0.015)
    assert claim_of({"large:10": 0.30, "small:5,large:5": 0.33}, metric="clip").fraction == 0.5


def test_records_without_resamples_and_distances_from_the_large_member_claim_nothing() -> None:
    old = Measure(value=20.0, low=18.0, high=22.0, std=1.0)
    assert judge("fid", old, measure(20.0), samples=1000, margin=0.05) is None
    damaged = msgspec.structs.replace(measure(20.0), deviations=b"\x00\x7e" * 200)  # NaN
    assert judge("fid", damaged, measure(20.0), samples=1000, margin=0.05) is None
    assert judge("fid", msgspec.structs.replace(old, deviations=b"abc"), old, samples=1000, margin=0.05) is None
    claim = claim_of({"large:10": old, "small:5,large:5": old})
    assert claim.fraction is None
    assert "no resamples to compare" in claim.text("small", "large", "fid")
    points: dict[str, dict[str, float | Measure]] = {
        "large:10": {"latent_error": 0.0},
        "small:10": {"latent_error": 0.0},
    }
    assert claims_of(evaluation(points), ("small", "large")) == []
    assert claims_of(evaluation(points), ("small", "large"), "latent_error") == []


@pytest.mark.parametrize("margin", [0, -0.1, 1.5, math.nan, True, "5 %"])
def test_a_margin_is_a_share(margin: Any) -> None:
    with pytest.raises(BadInput, match="--margin"):
        check_margin(margin, "--margin")
    assert check_margin(0.1, "--margin") == 0.1


# --- what choices are made by


def test_a_share_counts_as_good_as_the_worst_below_it() -> None:
    texts = ["large:10", "small:2,large:8", "small:5,large:5", "small:7,large:3", "small:10", "large:5,small:5"]
    values = [20.0, 20.5, 23.0, 19.0, 40.0, 21.0]
    settings, measures = [setting(text) for text in texts], [measure(value) for value in values]
    bounds = bounds_of(settings, measures, "fid", measures[0], ("small", "large"))
    assert bounds == pytest.approx([0, 0.5, 3, 3, 20, 1], abs=0.01)
    assert bounds_of(settings, measures, "latent_error", measures[0], ("small", "large"))[0] == pytest.approx(
        20.8, abs=0.1
    )
