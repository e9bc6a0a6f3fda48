"""The metrics against other implementations on the same features: torchmetrics, scipy and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from tstitch_engines.errors import BadInput
from tstitch_trt.study.quality.gaussian import FrechetTo, frechet_distance, gaussian_of
from tstitch_trt.study.quality.kernel import KernelTo
from tstitch_trt.study.quality.manifold import Manifold, recall_halves
from tstitch_trt.study.quality.pairs import decibels, squared_errors
from tstitch_trt.study.quality.resampling import bootstrap_counts, estimate, estimate_mean, estimate_median
from tstitch_trt.study.statistics import compare_rows

Floats = NDArray[np.float32]


class Pixels(nn.Module):
    """A feature network for torchmetrics: the pixels themselves."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def two_sets(real: int = 400, drawn: int = 300) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures uint8 ``[N,2,2,3]`` of two distributions."""
    rng = np.random.default_rng(7)
    mixing = rng.standard_normal((12, 12))
    a = rng.standard_normal((real, 12)) @ mixing * 12 + 128
    b = rng.standard_normal((drawn, 12)) @ (mixing + 0.3 * rng.standard_normal((12, 12))) * 12 + 135
    return tuple(np.clip(x, 0, 255).astype(np.uint8).reshape(-1, 2, 2, 3) for x in (a, b))  # type: ignore[return-value]


def features(images: NDArray[np.uint8]) -> Floats:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1).astype(np.float32)


def by_torchmetrics(metric: Any, real: NDArray[np.uint8], drawn: NDArray[np.uint8]) -> Any:
    for images, is_real in ((real, True), (drawn, False)):
        metric.update(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), real=is_real)
    return metric.compute()


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, drawn = two_sets()
    metric = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    want = float(by_torchmetrics(metric, real, drawn))
    got = frechet_distance(gaussian_of(features(real)), gaussian_of(features(drawn)))
    assert got == pytest.approx(want, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_the_kernel_distance_is_that_of_torchmetrics_over_one_subset_of_all() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, drawn = two_sets(300, 300)
    metric = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=300)
    want, _ = by_torchmetrics(metric, real, drawn)
    assert KernelTo(features(real))(features(drawn)) == pytest.approx(float(want), rel=1e-3)


def test_the_kernel_distance_is_that_of_a_double_loop_for_unequal_sets() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((11, 5)), rng.standard_normal((17, 5)) + 0.5

    def k(a: Any, b: Any) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert KernelTo(y)(x) == pytest.approx(within_x + within_y - 2 * across, rel=1e-9)


def test_the_kernel_distance_of_equal_distributions_is_about_zero_however_few_the_samples() -> None:
    rng = np.random.default_rng(2)
    found = [KernelTo(rng.standard_normal((20, 8)))(rng.standard_normal((20, 8))) for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    assert min(found) < 0


def test_resampling_the_kernel_distance_does_not_raise_it() -> None:
    rng = np.random.default_rng(3)
    x, to = rng.standard_normal((60, 8)), KernelTo(rng.standard_normal((90, 8)) + 0.4)
    resampled = to.resampled(x, bootstrap_counts(60, 2000))
    assert resampled.mean() == pytest.approx(to(x), abs=3 * resampled.std() / np.sqrt(2000))


def manifold_by_loops(of: Floats, tested: Floats, neighbours: int) -> float:
    """The share of ``tested`` inside a ball of ``of``, pair by pair with torch's exact distances."""
    spans = torch.cdist(*(torch.from_numpy(of.astype(np.float64)),) * 2, compute_mode="donot_use_mm_for_euclid_dist")
    cross = torch.cdist(
        torch.from_numpy(tested.astype(np.float64)),
        torch.from_numpy(of.astype(np.float64)),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    radii = [sorted(d for j, d in enumerate(row) if j != i)[neighbours - 1] for i, row in enumerate(spans.tolist())]
    inside = [any(d <= r for d, r in zip(row, radii, strict=True)) for row in cross.tolist()]
    return float(np.mean(inside))


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_plain_loops(neighbours: int) -> None:
    rng = np.random.default_rng(neighbours)
    real = rng.standard_normal((150, 6)).astype(np.float32)
    drawn = (rng.standard_normal((110, 6)) * 0.9 + 0.6).astype(np.float32)
    precision = Manifold(real, neighbours=neighbours).holds(drawn).mean()
    recall = Manifold(drawn, neighbours=neighbours).holds(real).mean()
    assert precision == manifold_by_loops(real, drawn, neighbours)
    assert recall == manifold_by_loops(drawn, real, neighbours)
    assert 0.05 < recall < precision < 1


def test_a_manifold_over_several_blocks_of_rows_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((50, 4)), rng.standard_normal((40, 4))
    want, radii = Manifold(x).holds(y), Manifold(x).radii
    monkeypatch.setattr("tstitch_trt.study.quality.manifold._ROWS", 16)
    np.testing.assert_allclose(Manifold(x).radii, radii, rtol=1e-6)
    assert (Manifold(x).holds(y) == want).all()


def test_halves_of_recall_are_recalls_of_halves_and_spread_as_fresh_samples_do() -> None:
    rng = np.random.default_rng(5)
    real = rng.standard_normal((400, 3))
    halves = recall_halves(rng.standard_normal((200, 3)), real, halves=60)
    fresh = [Manifold(rng.standard_normal((200, 3))).holds(real).mean() for _ in range(60)]
    assert halves.std(ddof=1) == pytest.approx(np.std(fresh, ddof=1), rel=0.5)
    drawn = np.random.default_rng(6).standard_normal((20, 3))
    chosen = np.sort(np.random.default_rng(0).permutation(20)[:10])
    (half,) = recall_halves(drawn, real, halves=1)
    assert half == Manifold(drawn[chosen]).holds(real).mean()


def test_psnr_is_that_of_torchmetrics() -> None:
    from torchmetrics.image import PeakSignalNoiseRatio

    rng = np.random.default_rng(8)
    a = rng.integers(0, 256, (9, 8, 8, 3), np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-9, 10, a.shape), 0, 255).astype(np.uint8)
    metric = PeakSignalNoiseRatio(data_range=255.0)
    want = metric(*(torch.from_numpy(x.astype(np.float32)) for x in (a, b)))
    assert float(decibels(squared_errors(a, b).mean())) == pytest.approx(float(want), rel=1e-5)
    assert decibels(squared_errors(a, a).mean()) == np.inf


def test_latent_errors_are_relative_norms_per_picture() -> None:
    b = np.stack([np.full((1, 2, 2), 2.0), np.zeros((1, 2, 2))]).astype(np.float32)
    a = b + 1
    assert compare_rows(a, b)[1].tolist() == [0.5, 2.0]  # a latent of zeros is not divided by


def test_resampled_frechet_distances_are_those_of_the_resampled_features() -> None:
    rng = np.random.default_rng(9)
    x, to = rng.standard_normal((80, 6)) + 100, FrechetTo(gaussian_of(rng.standard_normal((200, 6)) + 100))
    counts = bootstrap_counts(80, 3)
    want = [to(gaussian_of(np.repeat(x, row, axis=0))) for row in counts]
    np.testing.assert_allclose(to.resampled(x, counts), want, rtol=1e-9)


def test_intervals_hold_the_value_and_cover_what_other_samples_give() -> None:
    """Of 200 sets of samples about 95 % have an interval that holds the mean over all sets: the bias left aside."""
    rng = np.random.default_rng(10)
    to = FrechetTo(gaussian_of(rng.standard_normal((5000, 4))))
    sets = [rng.standard_normal((150, 4)) * 1.2 for _ in range(120)]
    values = np.array([to(gaussian_of(x)) for x in sets])
    counts = bootstrap_counts(150, 150)
    found = [estimate(value, to.resampled(x, counts)).measure for value, x in zip(values, sets, strict=True)]
    assert all(m.low <= m.value <= m.high for m in found)
    covered = np.mean([m.low <= values.mean() <= m.high for m in found])
    assert 0.85 <= covered <= 1
    assert np.mean([m.std for m in found]) == pytest.approx(values.std(), rel=0.3)


def test_means_and_medians_have_the_intervals_of_statistics() -> None:
    values = np.random.default_rng(11).standard_normal(2000) + 3
    mean = estimate_mean(values, resamples=400).measure
    assert mean.value == pytest.approx(values.mean())
    assert mean.std == pytest.approx(values.std() / np.sqrt(2000), rel=0.15)
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * mean.std, rel=0.15)
    median = estimate_median(values, resamples=400).measure
    assert median.value == pytest.approx(np.median(values))
    assert median.std == pytest.approx(1.2533 * mean.std, rel=0.3)  # sqrt(pi / 2), for a Gaussian


def test_what_two_points_share_does_not_move_their_difference() -> None:
    rng = np.random.default_rng(12)
    shared, own = rng.standard_normal(1000) * 10, rng.standard_normal(1000)
    a, b = estimate_mean(shared, resamples=400), estimate_mean(shared + 1 + own, resamples=400)
    gap, std = b.minus(a)
    assert gap == pytest.approx(1 + own.mean())
    assert std == pytest.approx(1 / np.sqrt(1000), rel=0.15)  # each mean alone moves ten times as much
    assert a.measure.high > b.measure.low
    assert a.minus(a) == (0, 0)
    alike = estimate(2.0, np.array([1.0, 3.0])).minus(estimate(1.5, np.array([11.0, 13.0])))
    assert alike == (0.5, 0.0)


def test_few_resamples_give_a_normal_interval() -> None:
    measure = estimate(5.0, np.array([9.0, 11.0, 10.0])).measure
    assert measure.std == pytest.approx(1.0)
    assert (measure.low, measure.high) == (pytest.approx(5 - 1.959964), pytest.approx(5 + 1.959964))


@pytest.mark.parametrize("work", [lambda x, y: KernelTo(y)(x), lambda x, y: Manifold(y).holds(x)])
def test_features_of_two_networks_and_too_few_are_refused(work: Any) -> None:
    some = np.zeros((9, 2))
    with pytest.raises(BadInput, match=r"3 and 2|2 and 3"):
        work(some, np.zeros((9, 3)))
    with pytest.raises(BadInput, match="shape"):
        work(some, np.zeros((1, 2)))
