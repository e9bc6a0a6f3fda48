"""Requests that are sent to engines elsewhere, and again where one is lost; with real engines, in this process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tstitch_engines.errors import Cancelled, Closed, DeviceLost, OutOfTime, Overloaded, UnknownName
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.serve import remote
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import LaneEvent
from tstitch_trt.serve.ray_scaling import WaitingLanes
from tstitch_trt.serve.remote import Accepted, Asked, Message, Refused, RemoteEngine, answer, facts_of

OPTIONS = SampleOptions.from_keywords({"labels": [3, 5], "seed": 7, "steps": 8})


@pytest.fixture(scope="module")
def engine(fashion_bundle: Path) -> Iterator[Engine]:
    engine = Engine(fashion_bundle, load={"threads": 1})
    yield engine
    engine.close(cancel=True)


class Lines:
    """Ways to an engine. The way of try ``i`` is lost after ``lasts[i]`` messages, further ones not at all."""

    def __init__(self, engine: Engine, *lasts: int) -> None:
        self.engine = engine
        self.lasts = lasts
        self.asked: list[Asked] = []
        self.busy = 0  # further tries that are refused

    async def __call__(self, asked: Asked) -> AsyncGenerator[Message, None]:
        self.asked.append(asked)
        if self.busy and len(self.asked) > 1:
            self.busy -= 1
            full = Overloaded("full", hint="wait")
            full.retry_after = 0.1
            yield Refused(full)
            return
        place = len(self.asked) - 1
        left = self.lasts[place] if place < len(self.lasts) else 10_000
        if not left:
            raise ConnectionResetError("lost")
        async for message in answer(self.engine, asked):
            yield message
            left -= 1
            if not left:
                raise ConnectionResetError("lost")


@contextmanager
def remote_engine(lines: Lines) -> Iterator[RemoteEngine]:
    far = RemoteEngine(lines, facts_of(lines.engine), lost=lambda error: isinstance(error, ConnectionResetError))
    try:
        yield far
    finally:
        far.close()


@pytest.mark.parametrize("lasts", [(), (0,), (1,), (3,)], ids=["no", "before", "accepted", "on its way"])
def test_what_an_engine_had_is_drawn_by_another(engine: Engine, lasts: tuple[int, ...]) -> None:
    alone = engine.submit(OPTIONS).result()
    lines = Lines(engine, *lasts)
    with remote_engine(lines) as far:
        handle = far.submit(OPTIONS, previews=3)
        events = [event for event in handle.progress() if isinstance(event, LaneEvent)]
        result = handle.result(60)
    assert len(lines.asked) == 1 + len(lasts)
    places = [(event.image, event.step) for event in events]
    assert len(places) == len(set(places)) == 6, "none is told twice, and none is missing"
    assert result.images is not None
    assert alone.images is not None
    np.testing.assert_array_equal(result.images, alone.images)
    assert (handle.n, handle.plan.steps, handle.state, result.seeds) == (2, 8, "done", (7, 8))


def test_a_request_is_given_to_two_engines_at_most(engine: Engine) -> None:
    lines = Lines(engine, 1, 1)
    with remote_engine(lines) as far, pytest.raises(DeviceLost, match="2 engines"):
        far.submit(OPTIONS).result(60)
    with remote_engine(Lines(engine, 0, 0)) as far, pytest.raises(DeviceLost):
        far.submit(OPTIONS)


def test_what_was_accepted_waits_for_room(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAIT", 0.01)
    lines = Lines(engine, 1)
    lines.busy = 3
    with remote_engine(lines) as far:
        handle = far.submit(OPTIONS, latency_budget_ms=3_600_000.0, timeout=100.0)
        assert handle.result(60).seeds == (7, 8)
    assert len(lines.asked) == 5
    assert lines.asked[-1].latency_budget_ms is None, "it was accepted already"
    assert lines.asked[-1].timeout is not None
    assert lines.asked[-1].timeout < 100
    lines = Lines(engine, 1)
    lines.busy = 10_000
    with remote_engine(lines) as far, pytest.raises(OutOfTime):
        far.submit(OPTIONS, timeout=0.3).result(60)


def test_a_schedule_made_cheaper_under_load_stays_what_it_was(engine: Engine) -> None:
    """The other engine may have no load, or another one."""
    cheap = engine.runtime().plan(steps=6, fraction=1.0)

    class Adapting(Lines):
        async def __call__(self, asked: Asked) -> AsyncGenerator[Message, None]:
            async for message in super().__call__(asked):
                first = isinstance(message, Accepted) and len(self.asked) == 1
                yield dataclasses.replace(message, plan=cheap, adapted="fraction 0.4 -> 1") if first else message

    lines = Adapting(engine, 1)
    with remote_engine(lines) as far:
        handle = far.submit(OPTIONS)
        drawn = handle.result(60).plan
    assert handle.adapted == "fraction 0.4 -> 1"
    assert drawn.schedule.names == handle.plan.schedule.names == ("small",) * 6


def test_errors_are_those_of_the_engine(engine: Engine) -> None:
    with remote_engine(Lines(engine)) as far:
        with pytest.raises(UnknownName, match="heun-9"):
            far.submit(SampleOptions.from_keywords({"labels": 1, "solver": "heun-9"}))
        with pytest.raises(UnknownName, match="boots"):
            far.runtime("boots")
        assert far.state().ready
    with pytest.raises(Closed):
        far.submit(OPTIONS)


def test_a_client_that_goes_frees_the_lanes(engine: Engine) -> None:
    with remote_engine(Lines(engine)) as far:
        handle = far.submit(SampleOptions.from_keywords({"labels": 1, "steps": 1000}))
        assert handle.cancel()
        with pytest.raises(Cancelled):
            handle.result(10)
        end = time.monotonic() + 20
        while any(model.open or model.lanes for model in engine.state().models.values()):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_replicas_follow_the_lanes_that_wait() -> None:
    policy = WaitingLanes(target=0.8)

    def wanted(*busy: float) -> int:
        metrics = {"busy": dict(enumerate(busy))} if busy else {}
        return policy(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=5))[0]

    assert wanted() == 5, "nobody has reported yet"
    assert wanted(0.0, 0.0) == 0, "Ray keeps the least that was set"
    assert (wanted(0.8), wanted(0.81), wanted(3.0, 1.0), wanted(0.1, 0.1, 0.1)) == (1, 2, 5, 1)
