"""Intervals by resampling: how far a metric would move with other samples, equally many.

The bootstrap draws samples again with replacement. A distance between distributions grows with fewer distinct samples,
so only the spread of the resamples is used, around the value itself. The interval does not cover the bias of few
samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.study.records import Measure

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "Estimate",
    "bootstrap_counts",
    "estimate",
    "estimate_mean",
    "estimate_median",
    "unpacked",
]

LEVEL: Final = 0.95
RESAMPLES: Final = 200
_KEPT: Final = 1000  # deviations in a record
_QUANTILES_FROM = 100  # with fewer resamples their outer quantiles are noise: the normal's are used


def bootstrap_counts(count: int, resamples: int) -> NDArray[np.int64]:
    """How often each resample holds each of ``count`` samples, ``[resamples, count]``; rows add up to ``count``.

    Always the same, so that samples from equal seeds are resampled alike.
    """
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value with its interval, and the deviation of each resample from their mean, ``[R]``.

    Samples from equal seeds are resampled alike, so what they share cancels in the difference of two estimates.
    """

    measure: Measure
    deviations: NDArray[np.float64]

    def minus(self, other: Estimate) -> tuple[float, float]:
        """The difference of the values, and its standard deviation."""
        difference = self.deviations - other.deviations
        return self.measure.value - other.measure.value, float(difference.std(ddof=1))

    def packed(self) -> bytes:
        """The deviations as ``Measure.deviations`` keeps them."""
        scale = self.measure.std or 1.0
        return np.asarray(self.deviations[:_KEPT] / scale, "<f2").tobytes()


def unpacked(measure: Measure) -> NDArray[np.float64]:
    """The deviations that a record keeps, ``[R]``; none where it keeps none or they are damaged."""
    if len(measure.deviations) % 2:
        return np.empty(0)
    found = np.frombuffer(measure.deviations, "<f2").astype(np.float64) * measure.std
    return found if np.isfinite(found).all() else np.empty(0)


def estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    """``value`` with the spread of its resamples ``[R]``, R >= 2, about it."""
    deviations = resampled - resampled.mean()
    std = float(resampled.std(ddof=1))
    if len(resampled) < _QUANTILES_FROM:
        high = NormalDist().inv_cdf((1 + LEVEL) / 2) * std
        low = -high
    else:
        low, high = map(float, np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Estimate(Measure(value=value, low=value + low, high=value + high, std=std), deviations)


def estimate_mean(values: NDArray[Any], resamples: int) -> Estimate:
    """The mean of one value per sample, ``[N]``."""
    numbers = values.astype(np.float64)
    counts = bootstrap_counts(len(numbers), resamples)
    return estimate(float(numbers.mean()), counts @ numbers / len(numbers))


def estimate_median(values: NDArray[Any], resamples: int) -> Estimate:
    """The median of one value per sample, ``[N]``."""
    numbers = values.astype(np.float64)
    chosen = np.random.default_rng(0).integers(0, len(numbers), (resamples, len(numbers)))
    return estimate(float(np.median(numbers)), np.median(numbers[chosen], axis=1))
