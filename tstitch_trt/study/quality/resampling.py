"""Intervals by resampling: how far a metric would move with other samples, equally many.

The bootstrap draws samples anew with replacement. A distance between distributions grows when it does (the samples are
fewer than they seem), so the spread of the resamples is used and not their level: it is laid around the value itself.
The interval is that of a metric *of this many samples*; it says nothing of the bias that few samples have.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.study.records import Measure

__all__ = ["LEVEL", "RESAMPLES", "Estimate", "bootstrap_counts", "interval", "rated", "rated_mean", "rated_median"]

LEVEL: Final = 0.95
RESAMPLES: Final = 200
_QUANTILES_FROM = 100  # with fewer resamples their outer quantiles are noise: the normal's are used


def bootstrap_counts(count: int, resamples: int, *, seed: int = 0) -> NDArray[np.int64]:
    """How often each of ``count`` samples is in each resample, ``[resamples, count]``; rows add up to ``count``.

    The same for the same ``seed``: points drawn from equal seeds are resampled alike.
    """
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def interval(value: float, resampled: NDArray[np.float64], *, level: float = LEVEL) -> Measure:
    """``value`` with the spread of its resamples ``[R]``, R >= 2, about it."""
    moved = resampled - resampled.mean()
    std = float(resampled.std(ddof=1))
    if len(resampled) < _QUANTILES_FROM:
        reach = NormalDist().inv_cdf((1 + level) / 2) * std
        return Measure(value=value, low=value - reach, high=value + reach, std=std)
    low, high = np.quantile(moved, [(1 - level) / 2, (1 + level) / 2])
    return Measure(value=value, low=value + float(low), high=value + float(high), std=std)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value, its interval and how far each resample lies from their mean, ``[R]``.

    Points drawn from equal seeds are resampled alike: what they share moves both, and not their difference.
    """

    measure: Measure
    moved: NDArray[np.float64]

    def minus(self, other: Estimate) -> tuple[float, float]:
        """The difference of the values, and its standard deviation."""
        difference = self.moved - other.moved
        return self.measure.value - other.measure.value, float(difference.std(ddof=1))


def rated(value: float, resampled: NDArray[np.float64], *, level: float = LEVEL) -> Estimate:
    """``value`` and its resamples ``[R]``, R >= 2."""
    return Estimate(interval(value, resampled, level=level), resampled - resampled.mean())


def rated_mean(values: NDArray[Any], *, resamples: int, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The mean of one value per sample, ``[N]``."""
    numbers = values.astype(np.float64)
    counts = bootstrap_counts(len(numbers), resamples, seed=seed)
    return rated(float(numbers.mean()), counts @ numbers / len(numbers), level=level)


def rated_median(values: NDArray[Any], *, resamples: int, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The median of one value per sample, ``[N]``."""
    numbers = values.astype(np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(numbers), (resamples, len(numbers)))
    return rated(float(np.median(numbers)), np.median(numbers[chosen], axis=1), level=level)
