from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from support.networks import means_network
from tstitch_engines.errors import BadInput
from tstitch_trt.study.quality.gaussian import Gaussian, frechet_distance, gaussian_of
from tstitch_trt.study.quality.network import FeatureNetwork
from tstitch_trt.study.quality.real_images import read_reference
from tstitch_trt.study.quality.scorer import Scorer


def by_scipy(a: Gaussian, b: Gaussian) -> float:
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real))


def some_gaussian(seed: int, features: int, count: int) -> Gaussian:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((features, features))
    return gaussian_of(generator.standard_normal((count, features)) @ mixing + generator.standard_normal(features))


@pytest.mark.parametrize("features", [1, 2, 16, 64])
def test_the_distance_is_that_of_a_general_matrix_square_root(features: int) -> None:
    a, b = some_gaussian(1, features, 500), some_gaussian(2, features, 700)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_equal_gaussians_have_no_distance_and_shifted_ones_that_of_their_means() -> None:
    a = some_gaussian(3, 8, 200)
    shifted = Gaussian(a.mean + 2, a.covariance, a.count)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, shifted) == pytest.approx(8 * 4, rel=1e-9)


def test_fewer_samples_than_features_still_have_a_distance() -> None:
    few, many = some_gaussian(4, 32, 10), some_gaussian(4, 32, 5000)
    assert np.linalg.matrix_rank(few.covariance) < 32
    distance = frechet_distance(few, many)
    assert np.isfinite(distance)
    assert distance > frechet_distance(some_gaussian(4, 32, 2500), many)  # the bias of few samples


def test_mean_and_covariance_are_numpys_in_float64() -> None:
    features = np.random.default_rng(5).standard_normal((50, 3)).astype(np.float32) + 1000
    got = gaussian_of(features)
    np.testing.assert_allclose(got.covariance, np.cov(features.astype(np.float64).T), rtol=1e-12)
    assert got.count == 50


@pytest.mark.parametrize("shape", [(1, 3), (3,)])
def test_too_few_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="N >= 2"):
        gaussian_of(np.zeros(shape))


def test_features_of_two_networks_are_refused() -> None:
    with pytest.raises(BadInput, match="2 and 3"):
        frechet_distance(some_gaussian(0, 2, 9), some_gaussian(0, 3, 9))


def test_a_scorer_feeds_images_in_minus_one_to_one(tmp_path: Path) -> None:
    path, reference = means_network(tmp_path, channels=2)
    network = FeatureNetwork(path)
    real = read_reference(reference, network, picture=None)
    scorer = Scorer(("fid", "accuracy"), network=network, reference=real, classifier=network)
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 2), np.uint8)
    want = (images / 127.5 - 1).mean((1, 2))
    features = scorer.extract(images, labels=want.argmax(1).tolist())
    np.testing.assert_allclose(features["features"], want, atol=1e-6)
    assert scorer.measure(features, "accuracy").value == 1.0
    known = Gaussian(np.zeros(2), np.eye(2), 10)
    distance = scorer.measure(features, "fid").value
    assert distance == pytest.approx(by_scipy(gaussian_of(features["features"]), known), rel=1e-6)


def test_accuracy_is_the_share_of_labels_that_win(tmp_path: Path) -> None:
    path, _ = means_network(tmp_path, channels=2)
    scorer = Scorer(("accuracy",), classifier=FeatureNetwork(path))
    images = np.zeros((4, 4, 4, 2), np.uint8)
    images[[0, 1, 3], ..., [1, 0, 0]] = 200  # the channel that is brighter wins
    images[2, ..., 1] = 200
    found = scorer.extract(images, labels=[1, 0, 0, 0])
    assert scorer.measure(found).value == 0.75
