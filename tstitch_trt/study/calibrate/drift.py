"""The usual times of trajectories, from slots that were measured while the machine's speed drifted.

A machine that is shared or changes its clock is faster or slower by a tenth and more, for about a second at a time.
Slots of different trajectories that are close in time then share the drift:

    log(time of a slot) = log(usual time of its trajectory) + log(drift at that moment) + noise

Both are found alternately. Usual times are means of what the drift does not explain. The drift is a mean of what the
usual times do not explain, over the slots nearby (a kernel smoother, shrunk to no drift where there are few). A slot
does not count for its own drift.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Slot", "usual_times"]

_NEAR_S: Final = 0.3  # a slot so many seconds away has the weight 1/e
_REACH_S: Final = 4 * _NEAR_S  # and none from here on
_DOUBT: Final = 0.1  # the weight of "no drift"
_ROUNDS: Final = 30
_OUTLIER: Final = 2.0  # times as long as the median of its trajectory, or as short

Key = TypeVar("Key", bound=Hashable)


class Slot(NamedTuple):
    """Runs of one trajectory in a row: when they began and ended, seconds of a steady clock, and ms of one run."""

    start: float
    stop: float
    ms: float


def usual_times(slots: Mapping[Key, Sequence[Slot]]) -> dict[Key, float]:
    """Milliseconds of a run of each trajectory without drift. ``slots``: at least one of each."""
    owner = np.array([index for index, those in enumerate(slots.values()) for _ in those])
    start, stop, ms = np.array([slot for those in slots.values() for slot in those], np.float64).T
    order = np.argsort(start, kind="stable")
    owner, start, stop, logs = owner[order], start[order], stop[order], np.log(ms[order])
    first, second, weight = _neighbours(start, stop)
    total = np.bincount(first, weight, len(logs)) + np.bincount(second, weight, len(logs)) + _DOUBT
    drift = np.zeros(len(logs))
    for _ in range(_ROUNDS):
        rest, inside = _rest(logs - drift, owner)
        left = np.where(inside, drift + rest, 0.0)
        sums = np.bincount(first, weight * left[second], len(logs)) + np.bincount(
            second, weight * left[first], len(logs)
        )
        drift = sums / total
    drift -= np.log(np.mean(np.exp(drift)))  # its mean is 1
    rest, _ = _rest(logs - drift, owner)
    usual = np.exp(logs - drift - rest)
    return {key: float(usual[np.argmax(owner == index)]) for index, key in enumerate(slots)}


def _rest(logs: NDArray[np.float64], owner: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The excess of each over the mean of its owner, and which are no outliers; outliers are not in the mean."""
    count = owner.max() + 1
    # of two in the middle the lower: outliers are mostly slow
    median = np.array([np.quantile(logs[owner == index], 0.5, method="lower") for index in range(count)])
    inside = abs(logs - median[owner]) <= np.log(_OUTLIER)
    mean = np.bincount(owner[inside], logs[inside], count) / np.bincount(owner[inside], minlength=count)
    return logs - mean[owner], inside


def _neighbours(
    start: NDArray[np.float64], stop: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of slots that are near one another, each once, with their weight. ``start`` rises."""
    none = np.zeros(0, np.int64)
    found = [(none, none, np.zeros(0))]
    for distance in range(1, len(start)):
        gap = np.maximum(start[distance:] - stop[:-distance], 0.0)
        near = np.flatnonzero(gap < _REACH_S)
        if not len(near):
            break
        found.append((near, near + distance, np.exp(-gap[near] / _NEAR_S)))
    first, second, weight = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, second, weight
