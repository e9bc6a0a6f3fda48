"""The simulation against cases worked out by hand, a formula, and the scheduler alone."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.scheduling import Asked, Device, TableCosts
from tstitch_trt.serve.policy import DeadlineFirst
from tstitch_trt.serve.scheduler import Tick
from tstitch_trt.serve.simulate import Failure, RequestClass, Setup, Stage, bursts, poisson, simulate

COSTS = TableCosts({"a": (1.0, 0.0), "b": (3.0, 0.0)}, {"a": 4, "b": 4})
SHORT, LONG = RequestClass(("a",) * 2, decode=0.0), RequestClass(("b",) * 4, decode=0.0)


def test_steps_share_batches_as_requests_arrive() -> None:
    """The first one's steps run from 0 to 1 and 1 to 2, the second one's from 1 and 2: three batches for four steps."""
    found = simulate(Setup([SHORT], [(0.0, 0), (0.5, 0)], COSTS, limit=2.2))
    assert list(found.latency) == [2.0, 2.5]
    assert (found.ticks, found.lanes, found.images, found.seconds) == (3, 4, 2, 3.0)
    assert (found.throughput, found.goodput, found.batch) == (2 / 3, 1 / 3, 4 / 3)
    assert found.busy == [3.0]


def test_a_stage_takes_one_batch_at_a_time_beside_the_steps() -> None:
    """Encoded from 0 to 2 and from 2 to 5, two together; steps to 4 and 7; decoded to 8 and from 8 to 16."""
    each = RequestClass(("a",) * 2, encode=1.0, decode=2.0)
    stages = {"encode": Stage(1.0, 1.0, most=2), "decode": Stage(0.0, 2.0, most=8)}
    found = simulate(Setup([each], [(0.0, 0), (1.0, 0), (1.0, 0)], COSTS, **stages))
    assert list(found.latency) == [8.0, 15.0, 15.0]


def test_the_front_the_overhead_and_the_speed_take_time() -> None:
    found = simulate(Setup([SHORT], [(0.0, 0), (0.0, 0)], COSTS, front=1.5, overhead=0.25, speeds=[2.0]))
    assert list(found.latency) == [1.5 + 2 * 2.25, 1.5 + 3 * 2.25]
    assert list(simulate(Setup([SHORT], [(0.0, 0)] * 2, COSTS, front=1.5, fronts=2)).latency) == [3.5, 4.5]


def test_one_queue_waits_as_long_as_the_formula_says() -> None:
    """Poisson arrivals, one server, equal service: the mean wait is load / (2 (1 - load)) services."""
    one, load = RequestClass(("a",), decode=0.0), 0.7
    arrivals = islice(poisson(load, [one]), 20_000)
    found = simulate(Setup([one], arrivals, TableCosts({"a": (1.0, 0.0)}, {"a": 1}), slots=1, max_images=10**6))
    assert np.mean(found.latency) - 1 == pytest.approx(load / (2 * (1 - load)), rel=0.08)


def test_arrivals_have_their_rate_and_shares() -> None:
    classes = [RequestClass(("a",), share=3.0), RequestClass(("b",), share=1.0)]
    times, kinds = zip(*islice(poisson(5.0, classes, seed=1), 20_000), strict=True)
    assert times[-1] == pytest.approx(4000, rel=0.03)
    assert np.mean(kinds) == pytest.approx(0.25, abs=0.02)
    assert list(times) == sorted(times)
    burst = np.array([time for time, _ in islice(bursts(5.0, classes, period=10, busy=0.2, seed=1), 20_000)])
    assert burst[-1] == pytest.approx(4000, rel=0.03)
    assert (burst % 10 <= 2 + 1e-9).all()


def test_the_router_with_the_least_work_evens_out_what_a_turn_does_not() -> None:
    """Long and short requests in turn: by turns, one of two devices gets all the long ones."""
    arrivals = [(0.01 * index, index % 2) for index in range(40)]
    even, turns = (
        simulate(Setup([SHORT, LONG], arrivals, COSTS, devices=2, router=router))
        for router in ("least_work", "round_robin")
    )
    assert turns.busy.max() > 4 * turns.busy.min()
    assert even.busy.max() < 1.3 * even.busy.min()
    assert even.seconds < turns.seconds


def test_what_the_router_does_not_see_makes_devices_uneven() -> None:
    arrivals = list(islice(poisson(27.0, [SHORT]), 2000))
    fresh, stale = (
        simulate(Setup([SHORT], arrivals, COSTS, devices=16, slots=8, fronts=8, refresh=refresh))
        for refresh in (0.0, 2.0)
    )
    assert stale.percentile(99) > 1.2 * fresh.percentile(99)


def test_a_full_queue_refuses_and_the_client_comes_back() -> None:
    arrivals = [(0.0, 0)] * 20
    setup = {"classes": [SHORT], "arrivals": arrivals, "costs": COSTS, "slots": 4, "max_images": 4}
    found = simulate(Setup(**setup))
    assert (found.refused, found.done) == (12, 8)
    assert simulate(Setup(**setup, retries=50)).done == 20


def test_a_budget_is_kept_or_refused() -> None:
    asked = RequestClass(("a",) * 2, budget=6.0, decode=0.0)
    found = simulate(Setup([asked], islice(poisson(4.0, [asked]), 500), COSTS, slots=4))
    assert found.refused > 0
    assert found.done > 150
    assert found.missed == 0


def test_few_budgets_are_missed_though_batches_are_seldom_full() -> None:
    """Ten kinds of steps, whose lanes can't share batches: a full batch is not what they will run in."""
    costs = TableCosts({f"k{index}": (1.0, 0.5) for index in range(10)})
    kinds = [RequestClass((f"k{index}",) * 8, budget=60.0, decode=0.0) for index in range(10)]
    found = simulate(Setup(kinds, islice(poisson(0.2, kinds), 1500), costs))
    assert found.refused > 300
    assert 0 < found.missed < 0.03 * found.done


def test_a_lost_device_loses_no_request_and_one_that_is_lost_twice_fails() -> None:
    arrivals = [(0.1 * index, 1) for index in range(12)]
    setup = {"classes": [SHORT, LONG], "arrivals": arrivals, "costs": COSTS, "devices": 2, "detect": 0.5}
    lost = simulate(Setup(**setup, failures=[Failure(0, 5.0)]))
    assert (lost.done, lost.failed) == (12, 0)
    assert lost.retried == 6
    twice = simulate(Setup(**setup, failures=[Failure(0, 5.0, back=6.0), Failure(1, 7.0)]))
    assert (twice.failed, twice.done) == (6, 6)
    assert simulate(Setup(**{**setup, "devices": 1}, failures=[Failure(0, 1.05, back=3.0)])).done == 12


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 10),
    st.sampled_from(["least_work", "two_choices", "round_robin"]),
    st.floats(0, 3),
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 40), st.floats(0.1, 30)), max_size=3),
    st.integers(0, 2),
)
def test_every_request_is_answered_refused_or_failed(
    devices: int,
    slots: int,
    queue: int,
    router: str,
    refresh: float,
    failures: list[tuple[int, float, float]],
    retries: int,
) -> None:
    classes = [
        RequestClass(("a", "a", "b"), images=2, encode=1.0),
        RequestClass(("b",), bytes=3),
        RequestClass(("a",) * 3, budget=9.0, priority=1, decode=0.0),
    ]
    found = simulate(
        Setup(
            classes,
            islice(poisson(1.0, classes), 40),
            COSTS,
            devices=devices,
            slots=slots,
            max_images=queue,
            max_bytes=12,
            router=router,  # type: ignore[arg-type]
            encode=Stage(0.1, 0.1),
            decode=Stage(0.2, 0.1),
            refresh=refresh,
            fronts=2,
            retries=retries,
            jitter=0.1,
            failures=[Failure(device % devices, at, at + down) for device, at, down in failures],
            limit=20.0,
        )
    )
    assert found.requests == 40 == found.done + found.refused + found.failed
    assert found.most_waiting <= queue + slots
    assert found.good <= found.done
    assert not math.isnan(found.percentile(50)) or not found.done


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 2)), min_size=1, max_size=30, unique_by=lambda each: each[0]),
    st.integers(1, 6),
)
def test_one_device_runs_the_batches_that_the_scheduler_alone_does(
    arrivals: list[tuple[float, int]], slots: int
) -> None:
    classes = [
        RequestClass(tuple("aab"), images=2, decode=0.0),
        RequestClass(tuple("bbb"), priority=1, decode=0.0),
        RequestClass(tuple("aaaa"), decode=0.0),
    ]
    arrivals.sort()
    simulated = []

    def said(tick: Tick, began: float) -> tuple[object, ...]:
        return tick.key, began, [(lane.job.arrived, lane.image) for lane in tick.lanes]

    def watch(device: int, tick: Tick, began: float) -> None:
        simulated.append(said(tick, began))

    found = simulate(Setup(classes, arrivals, COSTS, slots=slots, watch=watch))
    kinds = [classes[kind] for _, kind in arrivals]
    asked = [
        Asked(kind.keys, at, images=kind.images, priority=kind.priority)
        for kind, (at, _) in zip(kinds, arrivals, strict=True)
    ]
    device = Device.of(COSTS, DeadlineFirst(), slots)
    assert simulated == [said(each.tick, each.began) for each in device.run(asked)]
    assert sorted(found.latency) == pytest.approx(sorted(device.ended[n] - at for n, (at, _) in enumerate(arrivals)))
