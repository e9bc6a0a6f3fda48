"""The front against brute force, and races in which the truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.manifests import manifest, member
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.study.quality.resampling import Estimate, estimate
from tstitch_trt.study.search.candidates import FRACTIONS, candidates, chosen, usual_steps
from tstitch_trt.study.search.racing import beaten, front, race, rounds
from tstitch_trt.study.settings import plan_of

small_floats = st.integers(0, 8).map(float)
points = st.lists(st.tuples(small_floats, small_floats), min_size=1, max_size=25)


def dominates(a: tuple[float, float], b: tuple[float, float], *, higher: bool) -> bool:
    """``a`` is as good as ``b`` in both and better in one."""
    no_worse = a[1] >= b[1] if higher else a[1] <= b[1]
    return a[0] <= b[0] and no_worse and a != b


@settings(max_examples=50, deadline=None)
@given(points, st.booleans())
def test_front_against_brute_force(field: list[tuple[float, float]], higher: bool) -> None:
    for point, inside in zip(field, front(field, higher=higher), strict=True):
        assert inside == (not any(dominates(other, point, higher=higher) for other in field))


@settings(max_examples=50, deadline=None)
@given(points, st.booleans())
def test_what_is_not_in_the_front_is_beaten_by_what_is(field: list[tuple[float, float]], higher: bool) -> None:
    inside = front(field, higher=higher)
    best = [point for point, is_in in zip(field, inside, strict=True) if is_in]
    for point, is_in in zip(field, inside, strict=True):
        assert is_in or any(dominates(other, point, higher=higher) for other in best)


def scored(value: float, moves: NDArray[np.float64]) -> Estimate:
    return estimate(value, value + moves)


def test_only_a_cheaper_one_that_is_clearly_better_beats() -> None:
    shared = np.array([-5.0, 5.0, -5.0, 5.0])  # of both: it moves them, and not their difference
    own = np.array([1.0, -1.0, -1.0, 1.0])
    one, other = shared + own, shared + own * [-1, -1, 1, 1]
    reach = 3 * float((one - other).std(ddof=1))
    assert 0 < reach < 3 * shared.std()
    mine = scored(10.0, one)
    near, clear = scored(10.1 - reach, other), scored(9.9 - reach, other)
    assert clear.measure.high > mine.measure.low
    assert beaten(5.0, mine, [(4.0, clear)])
    assert beaten(5.0, mine, [(5.0, clear)])
    assert not beaten(5.0, mine, [(5.1, clear)])  # it costs more
    assert not beaten(5.0, mine, [(4.0, near)])
    assert beaten(5.0, mine, [(4.0, near), (3.0, clear)])
    assert not beaten(5.0, mine, [(5.0, mine)])
    assert not beaten(5.0, mine, [(4.0, clear)], higher=True)
    assert beaten(5.0, mine, [(4.0, scored(10.1 + reach, other))], higher=True)
    assert not beaten(5.0, mine, [(4.0, scored(9.9 + reach, other))], higher=True)


class Known:
    """Candidates whose true value is known: the value is within ``8 / n`` of it, and so say its resamples."""

    def __init__(self, truth: Mapping[int, float], seed: int) -> None:
        self.truth = truth
        self.rng = np.random.default_rng(seed)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, keys: Sequence[int], count: int) -> dict[int, Estimate]:
        self.asked += [(key, count) for key in keys]
        reach = 8.0 / count
        return {
            key: scored(self.truth[key] + self.rng.uniform(-reach, reach), reach * self.rng.standard_normal(200))
            for key in keys
        }


@settings(max_examples=50, deadline=None)
@given(points, st.integers(0, 1000), st.booleans())
def test_a_race_with_honest_intervals_never_drops_a_point_of_the_true_front(
    field: list[tuple[float, float]], seed: int, higher: bool
) -> None:
    costs = {key: cost for key, (cost, _) in enumerate(field)}
    truth = {key: value for key, (_, value) in enumerate(field)}
    raced = race(costs, rounds(64, 4), Known(truth, seed), higher=higher)
    assert raced.samples == 64
    for key, inside in enumerate(front(field, higher=higher)):
        assert not (inside and raced.standings[key].dropped)
        assert raced.standings[key].samples == 64 or raced.standings[key].dropped


def test_separated_candidates_are_dropped_early_and_the_front_is_found() -> None:
    costs = {0: 1.0, 1: 2.0, 2: 3.0, 3: 3.0, 4: 10.0}
    truth = {0: 100.0, 1: 50.0, 2: 80.0, 3: 20.0, 4: 21.0}  # 2 is beaten by 1, and 4, narrowly, by 3
    known = Known(truth, 0)
    raced = race(costs, rounds(256, 16), known)
    assert raced.standings[2].dropped
    assert raced.standings[2].samples == 16
    assert (2, 32) not in known.asked
    assert [key for key in costs if not raced.standings[key].dropped and key != 4] == [0, 1, 3]
    assert raced.standings[4].dropped


def test_what_the_others_are_compared_with_is_never_dropped() -> None:
    known = Known({0: 1.0, 1: 90.0, 2: 95.0}, 0)
    raced = race({0: 1.0, 1: 2.0, 2: 3.0}, rounds(256, 16), known, keep=1)
    assert raced.standings[2].dropped
    assert (raced.standings[1].dropped, raced.standings[1].samples) == (False, 256)


def test_time_that_runs_out_leaves_the_last_whole_round() -> None:
    known = Known({0: 1.0, 1: 2.0}, 0)
    raced = race({0: 1.0, 1: 0.5}, (4, 8, 16), lambda keys, count: None if count == 16 else known(keys, count))
    assert raced.samples == 8
    assert all(s.samples == 8 and not s.dropped for s in raced.standings.values())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 200))
def test_rounds_double_and_end_with_all_samples(samples: int, chunk: int) -> None:
    found = rounds(samples, chunk)
    assert found[-1] == samples
    assert all(count == chunk * 2**i for i, count in enumerate(found[:-1]))
    assert list(found) == sorted(set(found))


# --- candidates

KINDS = ("fewer steps", "one member", "two members", "three members", "large-small-large")
TWO = manifest()
EVERY, _ = candidates(TWO, steps=[4, 10], solvers=["ddim"], guidance=1.0)
THREE = manifest({name: member() for name in ("small", "base", "large")})


def test_candidates_are_each_once_and_what_they_are_called() -> None:
    found, refused = candidates(TWO, steps=[5, 10], solvers=["ddim", "dpmpp-2m", "ddim"], guidance=1.5)
    assert refused == []
    assert len({c.key for c in found}) == len(found)
    assert found[0].kind == "fewer steps"
    assert found[0].setting.schedule == "large:10"
    by_kind = {kind: [c.setting.schedule for c in found if c.kind == kind] for kind in KINDS}
    assert by_kind["fewer steps"] == ["large:10", "large:5"] * 2
    assert by_kind["one member"] == ["small:10", "small:5"] * 2
    assert by_kind["two members"][:4] == ["small:2,large:8", "small:4,large:6", "small:6,large:4", "small:8,large:2"]
    assert by_kind["large-small-large"][:4] == [
        "large:4,small:2,large:4", "large:3,small:4,large:3", "large:2,small:6,large:2", "large:1,small:8,large:1"
    ]  # fmt: skip
    assert by_kind["three members"] == []
    for candidate in found:
        plan = plan_of(TWO, candidate.setting)
        assert plan.steps == sum(candidate.setting.members.values()) == candidate.setting.rows
        assert candidate.setting.guidance == 1.5


def test_three_members() -> None:
    found, _ = candidates(THREE, steps=[10], solvers=["ddim"], guidance=1.0, fractions=(0.2, 0.5))
    of = {kind: {c.setting.schedule for c in found if c.kind == kind} for kind in KINDS}
    assert of["one member"] == {"small:10", "base:10"}
    assert of["two members"] == {
        f"{a}:{n},{b}:{10 - n}" for a, b in (("small", "base"), ("small", "large"), ("base", "large")) for n in (2, 5)
    }
    assert of["three members"] == {"small:2,base:2,large:6", "small:2,base:5,large:3", "small:5,base:2,large:3"}
    assert "large:4,small:2,large:4" in of["large-small-large"]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(0, 50))
def test_a_sample_of_the_candidates_keeps_the_reference(trials: int, seed: int) -> None:
    every = EVERY
    found = chosen(every, trials, seed=seed)
    assert found[0] is every[0]
    assert len(found) == min(trials, len(every))
    assert [c for c in every if c in found] == found
    assert chosen(every, trials, seed=seed) == found


def test_usual_steps() -> None:
    assert usual_steps(50) == (10, 20, 50)
    assert usual_steps(1) == (1,)


def test_bad_candidates() -> None:
    usual = {"steps": [10], "solvers": ["ddim"], "guidance": 1.0, "fractions": FRACTIONS}
    every, _ = candidates(TWO, **usual)  # type: ignore[arg-type]
    for trials in (0, 1):
        with pytest.raises(BadInput, match=f"{trials} candidates"):
            chosen(every, trials, seed=0)
    with pytest.raises(BadInput, match="one member"):
        candidates(manifest({"only": member()}), **usual)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="0 steps"):
        candidates(TWO, **{**usual, "steps": [10, 0]})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no solver"):
        candidates(TWO, **{**usual, "solvers": []})  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="dimm"):
        candidates(TWO, **{**usual, "solvers": ["dimm"]})  # type: ignore[arg-type]
