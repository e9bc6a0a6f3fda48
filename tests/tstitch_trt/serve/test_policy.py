"""Policies on a clock that the batches move: nobody starves, caps and deadlines hold, device time is shared."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.scheduling import Asked, Device, TableCosts
from tstitch_trt.serve.policy import DeadlineFirst, FirstCome, LargestBatch
from tstitch_trt.serve.scheduler import Job, Policy, Scheduler

KEYS = ("small", "large", "huge")
POLICIES = (DeadlineFirst, FirstCome, LargestBatch)

costs_of_keys = st.builds(
    TableCosts,
    st.fixed_dictionaries({key: st.tuples(st.floats(0.01, 5), st.floats(0, 5)) for key in KEYS}),
    st.fixed_dictionaries({key: st.integers(1, 6) for key in KEYS}),
)
requests = st.lists(
    st.builds(
        Asked,
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=8),
        at=st.floats(0, 60),
        images=st.integers(1, 5),
        deadline=st.none() | st.floats(0, 200),
        priority=st.integers(-2, 2),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=80)
@given(costs=costs_of_keys, asked=requests, patience=st.floats(0.5, 6), slots=st.integers(1, 12))
def test_no_lane_waits_longer_than_the_bound(
    costs: TableCosts, asked: list[Asked], patience: float, slots: int
) -> None:
    ran = list(Device.of(costs, DeadlineFirst(patience=patience), slots).run(asked))
    around = max(each.around for each in ran)
    tick = max(each.ended - each.began for each in ran)
    assert max(wait for each in ran for wait in each.waits) <= (patience + 1) * around + tick + 1e-6


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, max_examples=60)
@given(costs=costs_of_keys, asked=requests, slots=st.integers(1, 12))
def test_the_device_is_busy_while_there_is_work_and_no_slot_is_free_while_a_lane_waits(
    policy: type[Policy], costs: TableCosts, asked: list[Asked], slots: int
) -> None:
    device = Device.of(costs, policy(), slots)
    steps, last = 0, 0.0
    for each in device.run(asked):
        lanes = each.tick.lanes
        assert 1 <= len(lanes) <= costs.cap(each.tick.key)
        assert len(set(lanes)) == len(lanes)
        assert each.began == last or each.began in [request.at for request in asked]  # else it had nothing to do
        last = each.ended
        steps += len(lanes)
        assert not device.scheduler.waiting or len(device.scheduler.running) + len(each.tick.lanes) >= slots
    assert device.ended.keys() == set(range(len(asked)))
    assert steps == sum(request.images * len(request.keys) for request in asked)


def ends(policy: Policy, costs: TableCosts, *asked: Asked) -> list[float]:
    device = Device.of(costs, policy)
    for _ in device.run(asked):
        pass
    return [device.ended[number] for number in range(len(asked))]


ALONE = TableCosts({"a": (1.0, 0.0), "b": (1.0, 0.0), "c": (1.0, 0.0)})


def test_deadlines_are_met_by_the_lane_that_can_wait_least() -> None:
    """20 s of steps are due by 20.5 s, 10 of them by 15, beside 10 s that may come at any time."""
    first, second, third = ends(
        DeadlineFirst(patience=100),
        ALONE,
        Asked("a" * 10, deadline=15.0),
        Asked("b" * 10, deadline=20.5),
        Asked("c" * 10),
    )
    assert first <= 15
    assert second <= 20.5
    assert third == 30
    assert ends(FirstCome(), ALONE, Asked("c" * 10), Asked("a" * 10, deadline=15.0))[1] > 15


def test_a_deadline_that_nobody_can_meet_pushes_no_other_aside() -> None:
    lost = Asked("a" * 10, deadline=9.5)
    assert ends(DeadlineFirst(patience=100), ALONE, lost, Asked("b" * 10, deadline=11.0))[1] <= 11


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    spare=st.lists(st.floats(0, 10), min_size=8, max_size=8),
    others=st.lists(st.integers(1, 12), max_size=4),
)
def test_every_set_of_deadlines_that_can_be_met_is_met(
    lengths: list[int], spare: list[float], others: list[int]
) -> None:
    """One lane a batch and all there from the start, so that the earliest deadline first is known to be the best."""
    costs = TableCosts(dict.fromkeys(range(12), (1.0, 0.0)))
    due, asked = 0.0, []
    for index, length in enumerate(lengths):
        due += length
        asked.append(Asked([index] * length, deadline=due + spare[index] + 1e-6))
    asked += [Asked([8 + index] * length) for index, length in enumerate(others)]
    found = ends(DeadlineFirst(patience=math.inf), costs, *asked)
    assert all(end <= each.deadline for end, each in zip(found, asked, strict=True) if each.deadline is not None)
    assert max(found) == sum(lengths) + sum(others)


@pytest.mark.parametrize(("small", "large"), [(1, 1), (6, 2), (2, 6), (12, 2)])
def test_device_time_is_shared_by_lanes_not_by_batches(small: int, large: int) -> None:
    """A batch of the large size takes 16 times as long, and gets no more of the device for it."""
    costs = TableCosts({"small": (0.5, 0.5), "large": (8.0, 8.0)}, {"small": 8, "large": 8})
    spent = {"small": 0.0, "large": 0.0}
    asked = [Asked(["small"] * 200_000, images=small), Asked(["large"] * 200_000, images=large)]
    for each in Device.of(costs, DeadlineFirst(patience=30)).run(asked, stop=10_000):
        spent[str(each.tick.key)] += each.ended - each.began
    assert spent["small"] / spent["large"] == pytest.approx(small / large, rel=0.1)


def test_what_is_soon_done_is_not_kept_waiting() -> None:
    """Two steps beside a hundred of others: they are done within a few seconds, not within the others' round."""
    found = ends(DeadlineFirst(), ALONE, Asked("a" * 100, images=8), Asked("b" * 100, images=8), Asked("c" * 2))
    assert found[2] <= 6
    assert max(found[:2]) == 202


def test_what_is_known_of_groups_that_are_gone_is_let_go() -> None:
    policy = DeadlineFirst()
    costs = TableCosts(dict.fromkeys(range(100), (1.0, 0.0)))
    for _ in Device.of(costs, policy).run([Asked([size] * 3, at=2.0 * size) for size in range(100)]):
        assert len(policy._credit) <= 16


def test_low_priority_gets_a_slot_though_high_priority_never_ends() -> None:
    """One slot, and a request of high priority for every second of the device."""
    asked = [Asked("a", at=float(second), priority=1) for second in range(100)] + [Asked("a", priority=-1)]
    device = Device.of(ALONE, DeadlineFirst(ageing=10), slots=1)
    for _ in device.run(asked, stop=60):
        pass
    assert 19 <= device.ended[100] <= 23  # two levels of 10 s


def test_a_request_of_many_images_leaves_room_for_those_behind_it() -> None:
    costs = TableCosts(ALONE.once_each, {"a": 1, "b": 1})
    device = Device.of(costs, DeadlineFirst(ageing=10), slots=1)
    asked = [Asked("b" * 2, images=50), *(Asked("a" * 2, at=1.0 + second) for second in range(0, 40, 10))]
    for _ in device.run(asked):
        pass
    assert all(device.ended[number] - asked[number].at <= 10 for number in range(1, 5))


def test_lanes_beyond_a_cap_go_by_deadline_then_priority_then_steps_then_age() -> None:
    costs = TableCosts({"a": (1.0, 0.0)}, {"a": 1})
    scheduler = Scheduler(8, DeadlineFirst(), costs)
    old, new, high, due, short = Job(0.0), Job(1.0), Job(1.0, priority=1), Job(1.0, deadline=9.5), Job(1.0)
    for job in (new, old, high, due, short):
        scheduler.add(job, [(0, "aaa" if job is short else "aaaa", 0)], 2.0)
    scheduler.admit(2.0)
    order = []
    for now in range(2, 7):
        tick = scheduler.choose(now)
        assert tick is not None
        order.append(tick.lanes[0].job)
        scheduler.drop(tick.lanes)
    assert order == [due, high, short, old, new]


def test_short_requests_overtake_long_ones_and_not_for_ever() -> None:
    costs = TableCosts({"a": (1.0, 0.0)}, {"a": 1})
    for arrived, first in ((1.0, "short"), (900.0, "long")):
        scheduler = Scheduler(8, DeadlineFirst(stretch=8.0), costs)
        jobs = {"long": Job(0.0), "short": Job(arrived)}
        scheduler.add(jobs["long"], [(0, "a" * 100, 0)], 0.0)
        scheduler.add(jobs["short"], [(0, "a" * 2, 0)], arrived)
        scheduler.admit(arrived)
        tick = scheduler.choose(arrived)
        assert tick is not None
        assert tick.lanes[0].job is jobs[first]
