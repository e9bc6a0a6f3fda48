"""The engine and the simulation, the same requests at the same steps: both run the same batches in the same order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

from support.tiny import TinyPair
from tstitch_trt.runtime.lane_runner import LaneRunner
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.policy import DeadlineFirst
from tstitch_trt.serve.scheduler import Costs, Job, Key, Lane, Tick
from tstitch_trt.serve.simulate import RequestClass, Setup, simulate

SECONDS = 60.0
# While which batch a request comes, and what it is.
ARRIVALS: list[tuple[int, dict[str, Any]]] = [
    (-1, {"labels": [1, 2], "steps": 6, "fraction": 0.5}),
    (0, {"labels": [3], "steps": 3, "fraction": 0.0}),
    (2, {"labels": [1, 2, 3], "steps": 8, "fraction": 0.25, "guidance": 2.0}),
    (2, {"labels": [0], "steps": 4, "fraction": 1.0, "priority": 1}),
    (9, {"labels": [2] * 4, "steps": 5, "fraction": 0.4}),
    (15, {"labels": [1], "steps": 2, "fraction": 0.5, "priority": -1}),
]


class Known:
    """A step of the small member takes 1 s, one of the large 3 s, guided ones twice that; three lanes at most."""

    def seconds(self, key: Any, lanes: int) -> float:
        return (1.0 if key.member == "small" else 3.0) * (2 if key.guided else 1) * (1 + lanes / 10)

    def cap(self, key: Any) -> int:
        return 3


class Short(Known):
    """All steps take a millisecond, so that requests come about as soon after each other as with tiny networks."""

    def seconds(self, key: Any, lanes: int) -> float:
        return 0.001


class Recording(DeadlineFirst):
    """Chooses by ``Known`` costs, however long anything waits, and keeps what it chose."""

    def __init__(self, number: Callable[[Job], int]) -> None:
        super().__init__(patience=math.inf)
        self.batches: list[tuple[str, bool, list[tuple[int, int]]]] = []
        self._number = number

    def choose(self, groups: Mapping[Key, Sequence[Lane]], costs: Costs, now: float) -> Tick:
        tick = super().choose(groups, Known(), now)
        key: Any = tick.key
        lanes = sorted((self._number(lane.job), lane.image) for lane in tick.lanes)
        self.batches.append((key.member, key.guided, lanes))
        return tick

    def order(self, waiting: Lane, costs: Costs, now: float) -> float:
        return super().order(waiting, Known(), now)


class Step(NamedTuple):
    member: str
    guided: bool


def test_the_simulation_runs_the_batches_of_the_engine(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Recording(lambda job: int(job.handle.id))  # type: ignore[attr-defined]
    handles: list[Handle] = []
    batch = -1
    real = LaneRunner.step

    def submit(engine: Engine) -> None:
        """The requests that come while this batch runs."""
        for number, (at, asked) in enumerate(ARRIVALS):
            if at == batch:
                handles.append(engine.submit(**asked, request_id=str(number)))

    def step(self: LaneRunner, key: Any, slots: Sequence[int]) -> Any:
        nonlocal batch
        batch += 1
        before = len(handles)
        submit(engine)
        end = time.monotonic() + SECONDS
        while engine._book.inbox.qsize() < len(handles) - before:  # until they are encoded
            assert time.monotonic() < end
            time.sleep(0.001)
        return real(self, key, slots)

    monkeypatch.setattr(LaneRunner, "step", step)
    with Engine(tiny_pair.bundle, max_lanes=4, policy=lambda: policy, load={"threads": 1}) as engine:
        submit(engine)
        while len(handles) < len(ARRIVALS):
            time.sleep(0.01)
        for handle in handles:
            handle.result(timeout=SECONDS)
        plans = [handle.plan for handle in handles]

    times = [0.0, *((at + 0.5) * 0.001 + number * 1e-6 for number, (at, _) in enumerate(ARRIVALS) if at >= 0)]
    classes = [
        RequestClass(
            tuple(map(Step, plan.schedule.names, plan.guided)),
            images=len(asked["labels"]),
            priority=asked.get("priority", 0),
        )
        for plan, (_, asked) in zip(plans, ARRIVALS, strict=True)
    ]
    simulated = Recording(lambda job: times.index(job.arrived))
    found = simulate(
        Setup(classes, list(zip(times, range(len(times)), strict=True)), Short(), slots=4, policy=lambda: simulated)
    )
    assert found.done == len(ARRIVALS)
    assert simulated.batches == policy.batches
    assert len({tuple(lanes) for _, _, lanes in policy.batches}) > 8
