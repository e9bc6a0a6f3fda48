"""What trajectories take at the machine's usual pace, from turns that it ran at changing ones.

A machine that is shared or changes its clock runs the same work now faster, now slower, by a tenth and more, and stays
at a pace for about a second. Turns of different trajectories next to one another in time then share their pace:

    log(time of a turn) = log(usual time of its trajectory) + log(pace at that moment) + noise

Both are found by turns: the usual times as means of what the pace leaves, the pace as a mean of what the usual times
leave over, of the turns nearby (a kernel smoother, shrunk to no change where there are few). A turn does not count for
its own pace. That makes two trajectories comparable with a third of the turns that their plain means would need.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Slot", "usual_times"]

_NEAR_S: Final = 0.3  # the weight of a turn is 1/e when so many seconds lie between
_REACH_S: Final = 4 * _NEAR_S  # and none from here on
_DOUBT: Final = 0.1  # the weight of "no change"
_ROUNDS: Final = 30
_OUTLIER: Final = 2.0  # times as long as the median of its trajectory, or as short

Key = TypeVar("Key", bound=Hashable)


class Slot(NamedTuple):
    """Seconds of a steady clock at which it began and ended, and the milliseconds of one run in it."""

    start: float
    stop: float
    ms: float


def usual_times(turns: Mapping[Key, Sequence[Slot]]) -> dict[Key, float]:
    """Milliseconds of a run of each trajectory at the usual pace. ``turns``: at least one of each."""
    owner = np.array([index for index, those in enumerate(turns.values()) for _ in those])
    start, stop, ms = np.array([turn for those in turns.values() for turn in those], np.float64).T
    order = np.argsort(start, kind="stable")
    owner, start, stop, logs = owner[order], start[order], stop[order], np.log(ms[order])
    first, second, weight = _neighbours(start, stop)
    total = np.bincount(first, weight, len(logs)) + np.bincount(second, weight, len(logs)) + _DOUBT
    pace = np.zeros(len(logs))
    for _ in range(_ROUNDS):
        rest, inside = _rest(logs - pace, owner)
        left = np.where(inside, pace + rest, 0.0)
        sums = np.bincount(first, weight * left[second], len(logs)) + np.bincount(
            second, weight * left[first], len(logs)
        )
        pace = sums / total
    pace -= np.log(np.mean(np.exp(pace)))  # the usual pace is 1 in the mean
    rest, _ = _rest(logs - pace, owner)
    usual = np.exp(logs - pace - rest)
    return {key: float(usual[np.argmax(owner == index)]) for index, key in enumerate(turns)}


def _rest(logs: NDArray[np.float64], owner: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What each is above the mean of its owner, and which of them are no outliers; the mean is of those alone."""
    count = owner.max() + 1
    median = np.array([_lower_median(logs[owner == index]) for index in range(count)])
    inside = abs(logs - median[owner]) <= np.log(_OUTLIER)
    mean = np.bincount(owner[inside], logs[inside], count) / np.bincount(owner[inside], minlength=count)
    return logs - mean[owner], inside


def _lower_median(values: NDArray[np.float64]) -> float:
    """One of them, so that it is no outlier itself. Of two it is the lesser: what is out is slow."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _neighbours(
    start: NDArray[np.float64], stop: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of turns that are near one another, each once, with their weight. ``start`` rises."""
    firsts, seconds, weights = [], [], []
    for distance in range(1, len(start)):
        gap = np.maximum(start[distance:] - stop[:-distance], 0.0)
        near = np.flatnonzero(gap < _REACH_S)
        if not len(near):
            break
        firsts.append(near)
        seconds.append(near + distance)
        weights.append(np.exp(-gap[near] / _NEAR_S))
    if not firsts:
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0)
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(weights)
