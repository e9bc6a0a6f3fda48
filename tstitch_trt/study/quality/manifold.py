"""Precision and recall of generated features (Kynkäänniemi et al., arXiv 1904.06991).

The manifold of a set of features is the union of balls, one about each, that reach to its ``NEIGHBOURS``-th nearest
neighbour. Precision is the share of generated samples inside the manifold of the real ones (do they look real?), recall
the share of real ones inside the manifold of the generated (is everything real also drawn?).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput
from tstitch_trt.study.quality.gaussian import check_widths

__all__ = ["NEIGHBOURS", "Manifold", "recall_halves", "squared_distances"]

NEIGHBOURS: Final = 3  # as in the paper
_ROWS = 256  # of a matrix of distances at once

Floats = NDArray[np.float32]


def squared_distances(x: NDArray[Any], y: NDArray[Any]) -> Floats:
    """``|x - y|^2`` of all pairs of features ``[N,F]`` and ``[M,F]``, computed in float64: float32 ``[N,M]``."""
    check_widths(x.shape[1], y.shape[1])
    centre = y.mean(0, dtype=np.float64)  # near the origin the difference of large squares loses less
    a, b = x.astype(np.float64) - centre, y.astype(np.float64) - centre
    lengths = (b * b).sum(1)
    found = np.empty((len(a), len(b)), np.float32)
    for start in range(0, len(a), _ROWS):
        part = a[start : start + _ROWS]
        product = part @ b.T
        product *= -2
        product += lengths
        product += (part * part).sum(1)[:, None]
        found[start : start + _ROWS] = np.maximum(product, 0, out=product)
    return found


class Manifold:
    """The manifold of features ``[M,F]``, M > ``neighbours``."""

    def __init__(self, features: NDArray[Any], *, neighbours: int = NEIGHBOURS) -> None:
        if features.ndim != 2 or len(features) <= neighbours:
            raise BadInput(
                f"features of shape {list(features.shape)} span nothing: each needs {neighbours} neighbours",
                hint=f"score more than {neighbours} samples: --samples {2 * neighbours + 2}",
            )
        self.features = features
        self.radii = np.concatenate(
            [
                _radii(squared_distances(features[start : start + _ROWS], features), neighbours, start)
                for start in range(0, len(features), _ROWS)
            ]
        )

    def holds(self, features: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of ``features [N,F]`` lie inside, bool ``[N]``."""
        inside = [
            (squared_distances(features[start : start + _ROWS], self.features) <= self.radii).any(1)
            for start in range(0, len(features), _ROWS)
        ]
        return np.concatenate(inside)


def recall_halves(features: NDArray[Any], reference: NDArray[Any], *, halves: int) -> NDArray[np.float64]:
    """The recall of ``halves`` random halves of ``features [N,F]``, always the same, float64 ``[halves]``.

    Copies of a bootstrap would shrink the balls. Halves have none, and their variance is that of the whole (the
    delete-half jackknife: Shao and Wu, 1989).
    """
    own, across = squared_distances(features, features), squared_distances(reference, features)
    rng = np.random.default_rng(0)
    radii = np.full((halves, len(features)), -1, np.float32)
    for row in radii:
        chosen = np.sort(rng.permutation(len(features))[: len(features) // 2])
        row[chosen] = _radii(own[np.ix_(chosen, chosen)], NEIGHBOURS)
    real, drawn = np.nonzero(across <= radii.max(0))  # the few pairs that are near enough in any half
    near = across[real, drawn]
    found = [np.bincount(real[near <= row[drawn]], minlength=len(reference)) > 0 for row in radii]
    return np.array([inside.mean() for inside in found])


def _radii(distances: Floats, neighbours: int, start: int = 0) -> Floats:
    """Squared distance to the ``neighbours``-th nearest other, given those of features ``start``... to all."""
    nearest = distances.copy()
    rows = np.arange(len(nearest))
    nearest[rows, start + rows] = np.inf
    nearest.partition(neighbours - 1, axis=1)
    return nearest[:, neighbours - 1].copy()
