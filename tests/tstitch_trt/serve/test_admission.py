"""Admission: the queue is bounded, the time to try again follows the backlog, and what is promised is kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.scheduling import TableCosts
from tstitch_trt.serve.admission import Admission, Admitted, Booked, Cheaper, Load, Offer, Refused, load_of
from tstitch_trt.serve.costs import StageTimes
from tstitch_trt.serve.policy import DeadlineFirst
from tstitch_trt.serve.scheduler import Job, Scheduler, phases_of

COSTS = TableCosts({"small": (0.0, 0.1), "large": (0.0, 1.0)}, {"small": 4, "large": 4})  # a share is 0.1 and 1 s


def offer(keys: list[str], images: int = 1, **fields: object) -> Offer:
    return Offer(images, 10 * images, phases_of(keys), (8, 8), **{"decoded": False, **fields})  # type: ignore[arg-type]


def admission(images: int = 8, size: int = 10**6, **options: object) -> Admission:
    return Admission(images, size, COSTS, StageTimes(), **{"margin": 1.0, **options})  # type: ignore[arg-type]


LARGE = offer(["large"] * 10)
HALF = offer(["small"] * 5 + ["large"] * 5, fraction=0.5)
SMALL = offer(["small"] * 10, fraction=1.0)


def load(running: int = 0, waiting: int = 0, each: float = 10.0, slots: int = 4, **fields: object) -> Load:
    return Load(slots, (each,) * running, each * waiting, waiting, 10 * waiting, **fields)  # type: ignore[arg-type]


def test_a_queue_that_is_full_refuses_until_an_image_has_left() -> None:
    assert admission().admit([LARGE], load(4, 7), 0.0) == Admitted(0, 120.0)
    assert admission().admit([LARGE], load(4, 8), 0.0) == Refused("images", 10.0, 130.0)
    assert admission(size=85).admit([LARGE], load(4, 8, each=1.0), 0.0) == Refused("images", 1.0, 22.0)
    assert admission(20, 85).admit([LARGE], load(4, 8, each=1.0), 0.0) == Refused("bytes", 5 / 80 * 12.0, 22.0)


def test_what_never_fits_is_told_so() -> None:
    assert admission().admit([offer(["small"], 12)], load(), 0.0) == Admitted(0, pytest.approx(1.2))
    for found in (
        admission().admit([offer(["small"], 13)], load(), 0.0),
        admission(size=9).admit([LARGE], load(), 0.0),
        admission().admit([LARGE], load(), 0.0, budget=9.0),
    ):
        assert isinstance(found, Refused)
        assert found.retry_after == math.inf


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0.01, 100), max_size=4),
    st.lists(st.floats(0.01, 100), min_size=8, max_size=40),
    st.floats(0.01, 100),
    st.integers(1, 8),
)
def test_the_time_to_try_again_grows_with_the_backlog(
    running: list[float], waiting: list[float], more: float, images: int
) -> None:
    def retry(each: list[float]) -> float:
        full = Load(4, tuple(running), sum(each), len(each), 10 * len(each))
        found = admission(images=8).admit([offer(["large"], images)], full, 0.0)
        return found.retry_after if isinstance(found, Refused) else 0.0

    before = retry(waiting)
    assert 0 <= before <= sum(running) + sum(waiting)
    assert retry([*waiting, more]) >= before * (1 - 1e-9)
    assert retry([seconds * 2 for seconds in waiting]) >= before * (1 - 1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.booleans()), max_size=30), st.integers(1, 6))
def test_the_queue_never_grows_beyond_its_bounds(asked: list[tuple[int, int, bool]], slots: int) -> None:
    scheduler = Scheduler(slots, DeadlineFirst(), COSTS)
    gate, now = admission(images=8, size=70), 0.0
    for images, steps, tick in asked:
        held = sum(10 for _ in scheduler.waiting)
        keys = ["large"] * steps
        if isinstance(gate.admit([offer(keys, images)], load_of(scheduler, bytes=held), now), Admitted):
            scheduler.add(Job(now), [(image, keys, 0) for image in range(images)], now)
            scheduler.admit(now)
        assert len(scheduler.waiting) <= 8
        assert len(scheduler.waiting) * 10 <= 70
        if tick and (chosen := scheduler.choose(now)) is not None:
            now += COSTS.seconds(chosen.key, len(chosen.lanes))
            scheduler.ran(chosen, now)


def test_a_budget_is_admitted_only_if_it_can_be_met() -> None:
    assert admission().admit([LARGE], load(), 0.0, budget=10.0) == Admitted(0, 10.0)
    assert admission().admit([LARGE], load(3), 0.0, budget=10.0) == Admitted(0, 10.0), "those have no deadline"
    full = admission().admit([LARGE], load(4), 0.0, budget=11.0)
    assert full == Refused("budget", 39.0, 50.0), "no slot is free before 40 s"
    assert admission(margin=1.5).admit([LARGE], load(), 0.0, budget=14.0) == Refused("budget", math.inf, 15.0)


def test_a_budget_waits_for_the_deadlines_before_it_and_breaks_none_after_it() -> None:
    due = (Booked(0, 5.0, 8.0), Booked(0, 5.0, 30.0))
    assert admission().admit([LARGE], load(2, each=5.0, due=due), 0.0, budget=15.0) == Admitted(0, 15.0)
    assert isinstance(admission().admit([LARGE], load(2, each=5.0, due=due), 0.0, budget=14.0), Refused)
    promised = (Booked(0, 5.0, 14.0),)
    found = admission().admit([LARGE], load(1, each=5.0, due=promised), 0.0, budget=12.0)
    assert found == Refused("budget", 1.0, 13.0), "5 s of the other would end at 15"


def test_budgets_that_are_not_met_make_it_careful_and_those_that_are_make_it_bold_again() -> None:
    gate = admission(margin=1.0, missed=0.01)
    gate.ended(met=False)
    assert isinstance(gate.admit([LARGE], load(), 0.0, budget=10.5), Refused)
    assert gate.admit([LARGE], load(), 0.0, budget=11.0) == Admitted(0, pytest.approx(10 * gate.margin))
    for _ in range(200):
        gate.ended(met=True)
    assert gate.admit([LARGE], load(), 0.0, budget=10.0) == Admitted(0, 10.0)
    for _ in range(200):
        gate.ended(met=False)
    assert gate.admit([LARGE], load(), 0.0, budget=50.0) == Admitted(0, 50.0), "never beyond five times"


def test_a_request_is_made_cheaper_within_the_operators_limits() -> None:
    offers = [LARGE, HALF, SMALL]
    limits = Cheaper(max_fraction=0.5, min_steps=10)
    assert admission(cheaper=limits).admit(offers, load(), 0.0, budget=10.0) == Admitted(0, 10.0)
    assert admission(cheaper=limits).admit(offers, load(), 0.0, budget=6.0) == Admitted(1, 5.5)
    assert isinstance(admission(cheaper=limits).admit(offers, load(), 0.0, budget=2.0), Refused)
    assert admission(cheaper=Cheaper()).admit(offers, load(), 0.0, budget=2.0) == Admitted(2, pytest.approx(1.0))
    assert isinstance(admission(cheaper=Cheaper(min_steps=11)).admit(offers, load(), 0.0, budget=2.0), Refused)
    assert isinstance(admission().admit(offers, load(), 0.0, budget=2.0), Refused)
    assert admission(cheaper=Cheaper()).admit(offers, load(1, each=50.0), 0.0) == Admitted(0, 20.0), "no budget"


def test_the_stages_beside_the_steps_count() -> None:
    gate = admission()
    gate.stages.observe("encode", (8, 8), 1, 2.0)
    gate.stages.observe("decode", (8, 8), 1, 3.0)
    whole = offer(["large"] * 10, encoded=True, decoded=True)
    assert gate.admit([whole], load(), 0.0) == Admitted(0, 15.0)
    assert isinstance(gate.admit([whole], load(), 0.0, budget=14.0), Refused)


def test_the_load_of_a_scheduler() -> None:
    scheduler = Scheduler(2, DeadlineFirst(), COSTS)
    scheduler.add(Job(0.0), [(0, ["large"] * 3, 1)], 0.0)
    scheduler.admit(0.0)
    scheduler.add(Job(0.0, deadline=9.0), [(0, ["small", "large"], 0), (1, ["small", "large"], 0)], 0.0)
    scheduler.admit(0.0)
    found = load_of(scheduler, bytes=5, before=[Booked(2, 4.0, 3.0), Booked(1, 1.0)])
    assert found == Load(
        2, (2.0, 1.1), 6.1, 4, 5, (Booked(2, 4.0, 3.0), Booked(1, pytest.approx(2.2), 9.0)), pytest.approx(1.1)
    )
    assert found.seconds == pytest.approx(9.2)
