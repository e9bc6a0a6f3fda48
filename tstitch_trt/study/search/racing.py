"""A race of candidates by cost and quality: those that are clearly beaten get no more samples.

All start with few samples. A candidate that is significantly worse than one that costs no more is dropped; the samples
of the others are doubled until the number asked for is reached (racing: Maron and Moore, "Hoeffding races", NIPS 1993).
Significant are three standard deviations of the difference, resampled for both alike: they share seeds, so most
deviations cancel (blocking: Moore and Lee, ICML 1994). Only values of equally many samples are compared, so that the
bias of few samples is the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from tstitch_trt.study.quality.resampling import Estimate

__all__ = ["Race", "Standing", "beaten", "front", "race", "rounds"]

K = TypeVar("K", bound=Hashable)

_SURE: Final = 3.0  # standard deviations: there are many comparisons


@dataclass(frozen=True)
class Standing:
    """A candidate's last value, of ``samples`` samples. ``dropped``: before the end."""

    estimate: Estimate
    samples: int
    dropped: bool


@dataclass(frozen=True)
class Race(Generic[K]):
    """Every candidate's standing, and the number of samples of those that were not dropped."""

    standings: Mapping[K, Standing]
    samples: int


def rounds(samples: int, chunk: int) -> tuple[int, ...]:
    """Numbers of samples: ``chunk``, doubled from round to round, at last ``samples``."""
    found, count = [], chunk
    while count < samples:
        found.append(count)
        count *= 2
    return (*found, samples)


def front(points: Sequence[tuple[float, float]], *, higher: bool = False) -> list[bool]:
    """The Pareto set of (cost, value): which points no other beats, by being as good in both and better in one.

    ``higher``: large values are the good ones. Of equal points all are in it.
    """
    signed = [(cost, -value if higher else value) for cost, value in points]
    inside = [False] * len(signed)
    best, best_cost = float("inf"), float("inf")  # the best value so far, and the least cost that has it
    for index in sorted(range(len(signed)), key=lambda i: signed[i]):
        cost, value = signed[index]
        if value < best:
            best, best_cost = value, cost
        inside[index] = (cost, value) == (best_cost, best)
    return inside


def beaten(cost: float, estimate: Estimate, others: Sequence[tuple[float, Estimate]], *, higher: bool = False) -> bool:
    """Whether one of ``others`` costs no more and is significantly better."""
    for other_cost, other in others:
        if other_cost <= cost:
            gap, std = estimate.minus(other)
            if (-gap if higher else gap) > _SURE * std:
                return True
    return False


def race(
    costs: Mapping[K, float],
    counts: Sequence[int],
    estimate: Callable[[Sequence[K], int], Mapping[K, Estimate] | None],
    *,
    higher: bool = False,
    keep: K | None = None,
) -> Race[K]:
    """Compares the candidates ``costs`` round by round, with the numbers of samples ``counts``.

    ``estimate``: the values of those still in the race on so many samples; ``None`` where no time is left for that,
    which ends the race with the round before. The first round has to be measured. ``keep``: is never dropped, since the
    others are compared with it.
    """
    running = list(costs)
    standings: dict[K, Standing] = {}
    done = 0
    for count in counts:
        found = estimate(running, count)
        if found is None:
            break
        done = count
        standings |= {key: Standing(found[key], count, False) for key in running}
        field = [(costs[key], found[key]) for key in running]
        out = {key for key in running if key != keep and beaten(costs[key], found[key], field, higher=higher)}
        if count != counts[-1]:
            standings |= {key: Standing(found[key], count, True) for key in out}
            running = [key for key in running if key not in out]
    assert done, "the first round is measured"
    return Race(standings, done)
