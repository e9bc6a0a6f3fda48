"""The kernel distance of two sets of features (KID: Bińkowski et al., arXiv 1801.01401).

The squared maximum mean discrepancy under ``k(x, y) = (x.y / F + 1)^3``, estimated without bias over all pairs: the
limit of the mean over random subsets, without their noise. It may be slightly negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.study.quality.gaussian import check_features, check_widths

__all__ = ["KernelTo", "kernel"]

Doubles = NDArray[np.float64]
_ROWS = 256  # of a kernel matrix at once


def kernel(x: NDArray[Any], y: NDArray[Any]) -> Doubles:
    """``(x.y / F + 1)^3`` of all pairs of features ``[N,F]`` and ``[M,F]``, float64 ``[N,M]``."""
    base = x.astype(np.float64, copy=False) @ y.astype(np.float64, copy=False).T
    base /= x.shape[1]
    base += 1
    found = base * base
    found *= base
    return np.asarray(found)


class KernelTo:
    """The distance to one set of features ``[M,F]``, M >= 2, whose own kernel is summed once.

    ``MMD^2`` of the two sets, unbiased: pairs of a sample with itself are left out.
    """

    def __init__(self, reference: NDArray[Any]) -> None:
        check_features(reference, "kernel distance")
        self._y = reference.astype(np.float64)
        m = len(self._y)
        own = sum(float(part.sum()) for _, part in _parts(self._y, self._y))
        self._own = (own - float(_diagonal(self._y).sum())) / (m * (m - 1))

    def __call__(self, features: NDArray[Any]) -> float:
        return float(self.resampled(features, np.ones((1, len(features)), np.int64))[0])

    def resampled(self, features: NDArray[Any], counts: NDArray[np.integer[Any]]) -> Doubles:
        """The distances of resamples, float64 ``[R]``: row ``i`` of ``counts [R,N]`` says how often each is in.

        Two copies of one sample are no pair, so that the estimate stays unbiased.
        """
        check_features(features, "kernel distance")
        check_widths(self._y.shape[1], features.shape[1])
        x = features.astype(np.float64)
        weights = counts.astype(np.float64)
        total = weights.sum(1)
        within = np.zeros(len(weights))
        for rows, part in _parts(x, x):
            within += ((weights @ part.T) * weights[:, rows]).sum(1)
        within -= weights**2 @ _diagonal(x)
        across = np.concatenate([part.mean(1) for _, part in _parts(x, self._y)])
        return np.asarray(
            within / (total**2 - (weights**2).sum(1)) + self._own - 2 * (weights @ across) / total, np.float64
        )


def _parts(x: Doubles, y: Doubles) -> Iterator[tuple[slice, Doubles]]:
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, kernel(x[rows], y)


def _diagonal(x: Doubles) -> Doubles:
    return np.asarray(((x * x).sum(1) / x.shape[1] + 1) ** 3)
