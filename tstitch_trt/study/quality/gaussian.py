"""The Fréchet distance of two sets of features, each taken as one Gaussian.

It is the Fréchet Inception Distance (Heusel et al., arXiv 1706.08500) for any feature network, biased upwards for few
samples.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput

__all__ = ["FrechetTo", "Gaussian", "check_features", "check_widths", "frechet_distance", "gaussian_of"]

Doubles = NDArray[np.float64]


class Gaussian(msgspec.Struct, frozen=True):
    """Mean ``[F]`` and covariance ``[F,F]`` of ``count`` feature vectors, float64."""

    mean: Doubles
    covariance: Doubles
    count: int


def check_features(features: NDArray[Any], what: str) -> None:
    """Raises ``BadInput`` unless they are ``[N,F]``, N >= 2."""
    if features.ndim != 2 or len(features) < 2:
        raise BadInput(
            f"features of shape {list(features.shape)} have no {what}; allowed is [N, F] with N >= 2",
            hint="score at least 2 samples: --samples 2",
        )


def check_widths(a: int, b: int) -> None:
    """Raises ``BadInput`` unless two sets of features have as many dimensions."""
    if a != b:
        raise BadInput(f"features of {a} and {b} dimensions can't be compared", hint="take both from the same network")


def gaussian_of(features: NDArray[Any]) -> Gaussian:
    """Mean and unbiased covariance of features ``[N,F]``, N >= 2."""
    check_features(features, "covariance")
    exact = features.astype(np.float64)
    return Gaussian(exact.mean(0), np.atleast_2d(np.cov(exact, rowvar=False)), len(exact))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` (Dowson and Landau, 1982), in float64."""
    return FrechetTo(a)(b)


class FrechetTo:
    """The distance to one Gaussian, whose root is taken once.

    ``tr (S_a S_b)^(1/2)`` is the sum of the square roots of the eigenvalues of the symmetric ``R S_b R`` with
    ``R = S_a^(1/2)``: real and non-negative even when a covariance is singular (fewer samples than features), where
    a general matrix square root breaks down.
    """

    def __init__(self, a: Gaussian) -> None:
        self.reference = a
        values, vectors = np.linalg.eigh(a.covariance)
        self._root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    def __call__(self, b: Gaussian) -> float:
        """Raises ``BadInput`` for a Gaussian of another number of dimensions."""
        a = self.reference
        check_widths(len(a.mean), len(b.mean))
        cross = np.linalg.eigvalsh(self._root @ b.covariance @ self._root)
        mixed = np.sqrt(np.clip(cross, 0, None)).sum()
        difference = a.mean - b.mean
        distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed
        return max(float(distance), 0.0)  # equal Gaussians may come out a rounding below zero

    def resampled(self, features: NDArray[Any], counts: NDArray[np.integer[Any]]) -> Doubles:
        """The distances of resamples of features ``[N,F]``: row ``i`` of ``counts [R,N]`` says how often each is in.

        Float64 ``[R]``.
        """
        centre = features.mean(0, dtype=np.float64)
        centred = features.astype(np.float64) - centre
        found = np.empty(len(counts))
        for index, weights in enumerate(counts.astype(np.float64)):
            total = weights.sum()
            mean = weights @ centred / total
            spread = (centred * weights[:, None]).T @ centred - total * np.outer(mean, mean)
            found[index] = self(Gaussian(centre + mean, np.atleast_2d(spread / (total - 1)), int(total)))
        return found
