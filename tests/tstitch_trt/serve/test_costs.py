"""Costs of steps: what calibration and the batches that ran say, and what is taken where neither says anything."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tstitch_trt.serve.costs import CostPoint, MeasuredCosts, StageTimes
from tstitch_trt.serve.scheduler import Key


class Step(NamedTuple):
    member: str = "large"
    guided: bool = False
    size: tuple[int, int] = (8, 8)
    sizes: tuple[tuple[str, int], ...] = ()


def point(batch: int, seconds: float, **fields: object) -> CostPoint:
    return CostPoint(*Step(**fields)[:3], batch, seconds)  # type: ignore[arg-type]


def costs(*points: CostPoint, most: int = 16, **options: object) -> MeasuredCosts:
    return MeasuredCosts(points, most=lambda key: most, **options)  # type: ignore[arg-type]


FLAT = (point(1, 0.010), point(4, 0.010), point(8, 0.020), point(16, 0.040))  # the device is full at 4 images


def test_between_points_time_is_linear_and_beyond_them_each_image_costs_the_same() -> None:
    found = costs(*FLAT, most=64)
    assert [found.seconds(Step(), lanes) for lanes in (1, 3, 4, 6, 16, 32, 128)] == pytest.approx(
        [0.010, 0.010, 0.010, 0.015, 0.040, 0.080, 0.320]
    )


def test_the_cap_is_where_the_cost_of_an_image_stops_falling() -> None:
    assert costs(*FLAT).cap(Step()) == 4
    assert costs(*FLAT, most=3).cap(Step()) == 3
    assert costs(point(1, 0.01), point(16, 0.16)).cap(Step()) == 1
    assert costs(point(1, 0.01), point(16, 0.02)).cap(Step()) == 15  # within 5 % of the 16th


def test_without_points_the_cap_is_the_optimum() -> None:
    assert costs(optimum=lambda key: 6).cap(Step()) == 6
    assert costs(optimum=lambda key: 6, most=4).cap(Step()) == 4
    assert costs().cap(Step()) == 16


def test_a_size_without_points_costs_what_as_many_pixels_do() -> None:
    found = costs(*FLAT)
    larger = Step(size=(16, 16))
    assert found.seconds(larger, 2) == pytest.approx(found.seconds(Step(), 8))
    assert found.cap(larger) == 1
    assert found.cap(Step(size=(4, 8))) == 8


def test_guided_steps_without_points_cost_two_of_the_others() -> None:
    assert costs(*FLAT).seconds(Step(guided=True), 8) == pytest.approx(0.040)
    assert costs(point(8, 0.04, guided=True)).seconds(Step(), 8) == pytest.approx(0.020)


@settings(deadline=None, max_examples=80)
@given(
    st.dictionaries(st.integers(1, 32), st.floats(1e-4, 10), min_size=1, max_size=6),
    st.integers(1, 32),
    st.integers(1, 64),
    st.floats(0, 0.2),
)
def test_seconds_are_the_points_and_the_cap_is_within_the_tolerance(
    measured: dict[int, float], most: int, area: int, tolerance: float
) -> None:
    points = [point(batch, seconds, size=(1, area)) for batch, seconds in measured.items()]
    found = costs(*points, most=most, tolerance=tolerance)
    key = Step(size=(1, area))
    for batch, seconds in measured.items():
        assert found.seconds(key, batch) == pytest.approx(seconds) or batch > most
    each = [found.seconds(key, lanes) / lanes for lanes in range(1, most + 1)]
    cap = found.cap(key)
    assert 1 <= cap <= most
    assert each[cap - 1] <= min(each) * (1 + tolerance) * (1 + 1e-9)
    assert all(cost > min(each) * (1 + tolerance) * (1 - 1e-9) for cost in each[: cap - 1])


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("slower", [0.2, 1.0, 5.0])
def test_what_runs_is_learned_and_batches_that_never_ran_follow(calibrated: bool, slower: float) -> None:
    """A machine that is not as fast as when it was calibrated."""
    points = (point(1, 0.005), point(16, 0.080)) if calibrated else ()
    found, rng = costs(*points), np.random.default_rng(0)
    for _ in range(1000):
        lanes = int(rng.choice([1, 2, 3, 5, 8, 12, 16]))
        found.observe(Step(), lanes, slower * 0.005 * lanes * rng.uniform(0.9, 1.1))
    for lanes in (1, 5, 16):
        assert found.seconds(Step(), lanes) == pytest.approx(slower * 0.005 * lanes, rel=0.1)
    if calibrated:
        assert found.seconds(Step(), 7) == pytest.approx(slower * 0.005 * 7, rel=0.1)
    assert found.cap(Step()) == costs(*points).cap(Step())


def test_one_slow_step_changes_little() -> None:
    found = costs(*FLAT)
    found.observe(Step(), 8, 60.0)
    assert found.seconds(Step(), 8) <= 0.022 + 1e-9
    unknown = costs()
    for _ in range(20):
        unknown.observe(Step(), 8, 0.02)
    unknown.observe(Step(), 8, 60.0)
    assert unknown.seconds(Step(), 8) <= 0.022 + 1e-9


def test_lanes_that_are_padded_to_one_batch_cost_the_same() -> None:
    def padded(key: Key, lanes: int) -> int:
        return 1 << (lanes - 1).bit_length()

    found = costs(point(1, 0.01), point(16, 0.16), batch=padded)
    assert found.seconds(Step(), 5) == found.seconds(Step(), 8) == pytest.approx(0.08)
    for _ in range(100):
        found.observe(Step(), 5, 0.1)
    assert found.seconds(Step(), 8) == pytest.approx(0.1, rel=0.01)


def test_any_number_of_keys_is_kept_within_a_bound() -> None:
    found = costs()
    for size in range(3000):
        assert found.seconds(Step(size=(1, size + 1)), 1) > 0
    assert len(found._tables) <= 1000


def test_stages_are_learned_by_size() -> None:
    times = StageTimes(weight=0.5)
    assert times.seconds("decode", (8, 8), 3) == 0
    times.observe("decode", (8, 8), 4, 0.4)
    assert times.seconds("decode", (8, 8), 3) == pytest.approx(0.3)
    assert times.seconds("decode", (16, 16), 1) == pytest.approx(0.4)
    times.observe("decode", (8, 8), 1, 0.2)
    assert times.seconds("decode", (8, 8), 1) == pytest.approx(0.15)
    assert times.seconds("encode", (8, 8), 1) == 0
