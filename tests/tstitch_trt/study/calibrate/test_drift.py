"""Usual times from slots at drifting speeds, against the times that the slots were made of."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tstitch_trt.study.calibrate.drift import Slot, usual_times

TIMES = {"a": 20.0, "b": 55.0, "c": 130.0, "d": 400.0, "e": 90.0}  # ms


def slots_of(rng: np.random.Generator, drift: NDArray[np.float64], *, each: int = 20) -> dict[str, list[Slot]]:
    """Each ``each`` times in a random order, one slot after another. ``drift``: of each 10 ms; 5 % of noise besides."""
    names = rng.permutation([name for name in TIMES for _ in range(each)])
    found: dict[str, list[Slot]] = {name: [] for name in TIMES}
    now = 0.0
    for name in names:
        ms = TIMES[name] * drift[int(now * 100)] * np.exp(0.05 * rng.standard_normal())
        found[name].append(Slot(now, now + ms / 1e3, ms))
        now += ms / 1e3
    return found


def wandering(rng: np.random.Generator, seconds: float) -> NDArray[np.float64]:
    """A drift that is off by 15 % and forgets in a second (an Ornstein-Uhlenbeck process), 1 in the mean."""
    keep = np.exp(-0.01)
    logs = [0.0]
    for draw in rng.standard_normal(int(seconds * 100)):
        logs.append(keep * logs[-1] + 0.15 * np.sqrt(1 - keep**2) * draw)
    drift = np.exp(logs)
    return np.asarray(drift / drift.mean())


def ratios(found: dict[str, float]) -> NDArray[np.float64]:
    """How far each is from its true time, relative to the others: all may share a drift."""
    off = np.log([found[name] / ms for name, ms in TIMES.items()])
    return np.asarray(off - off.mean())


def test_a_wandering_pace_is_taken_out() -> None:
    ours, means = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        slots = slots_of(rng, wandering(rng, 60))
        ours.append(ratios(usual_times(slots)))
        means.append(ratios({name: float(np.mean([slot.ms for slot in those])) for name, those in slots.items()}))
    assert np.std(ours) < 0.6 * np.std(means)
    assert np.std(ours) < 0.02


def test_a_steady_pace_loses_little() -> None:
    ours, means = [], []
    for seed in range(40):
        slots = slots_of(np.random.default_rng(seed), np.ones(6000))
        ours.append(ratios(usual_times(slots)))
        means.append(ratios({name: float(np.mean([slot.ms for slot in those])) for name, those in slots.items()}))
    assert np.std(ours) < 1.3 * np.std(means)


def test_usual_is_the_mean_pace() -> None:
    """Half of the time everything takes nearly twice as long: the usual time is in between, as for the mean slot."""
    drift = np.tile(np.repeat([1.0, 1.9], 300), 20)
    slots = slots_of(np.random.default_rng(0), drift, each=60)
    for name, ms in usual_times(slots).items():
        assert ms == pytest.approx(TIMES[name] / np.mean(1 / drift), rel=0.05)


def test_an_outlier_does_not_count() -> None:
    rng = np.random.default_rng(1)
    slots = slots_of(rng, np.ones(6000))
    without = usual_times(slots)
    slots["c"][3] = slots["c"][3]._replace(ms=50 * TIMES["c"])
    assert usual_times(slots) == pytest.approx(without, rel=0.01)


@pytest.mark.parametrize(
    "slots",
    [
        {"a": [Slot(0, 1, 7.0)]},
        {"a": [Slot(0, 1, 7.0)], "b": [Slot(1, 2, 5.0)]},
        {"a": [Slot(5, 6, 7.0)], "b": [Slot(100, 101, 5.0), Slot(1, 2, 5.0)]},  # in any order, far from one another
        {"a": [Slot(0, 1, 2.0), Slot(10, 11, 19.0)], "b": [Slot(30, 31, 5.0)]},  # the second is far out
    ],
)
def test_few_turns_are_what_they_are(slots: dict[str, list[Slot]]) -> None:
    assert usual_times(slots) == pytest.approx({name: those[0].ms for name, those in slots.items()})
