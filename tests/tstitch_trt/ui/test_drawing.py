"""One press of the button: fractions in turn, pages that draw at once, and the example that a page opens with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

import tstitch_trt
from tstitch_engines.errors import BadInput, Busy, Cancelled, Overloaded, UnknownName
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.serve import Engine, TickInfo
from tstitch_trt.ui.drawing import Column, StepTimes, draw_in_turn
from tstitch_trt.ui.example import Example, Shown

REQUEST: dict[str, Any] = {"n": 1, "steps": 10, "solver": "ddim", "guidance": 1.5}


class Ticks(StepTimes):
    def __init__(self) -> None:
        super().__init__()
        self.lanes: list[int] = []

    def ticked(self, tick: TickInfo) -> None:
        super().ticked(tick)
        self.lanes.append(tick.lanes)


@pytest.fixture(scope="module")
def runtime(fashion_bundle: Path) -> Iterator[Runtime]:
    with tstitch_trt.load(fashion_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def engine(runtime: Runtime, ticks: Ticks) -> Iterator[Engine]:
    engine = Engine(runtime, max_queue=8, observer=ticks)
    yield engine
    engine.close(cancel=True)


async def drawn(
    engine: Engine, ticks: StepTimes, fractions: list[float], check: Callable[[], None] = lambda: None, **request: Any
) -> list[tuple[int, Column, dict[int, Any]]]:
    requests = [{**REQUEST, **request, "fraction": fraction} for fraction in fractions]
    return [new async for new in draw_in_turn(engine, requests, ticks, check=check)]


def test_two_pages_share_batches_get_their_own_pictures_and_know_it(
    engine: Engine, runtime: Runtime, ticks: Ticks
) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(
            *(drawn(engine, ticks, [0.4], labels=[label], seed=label, steps=30) for label in (3, 5))
        )

    pages = asyncio.run(both())
    assert max(ticks.lanes) == 2
    assert len(ticks.lanes) < 2 * 30
    engine.close()
    for label, news in zip((3, 5), pages, strict=True):
        previewed = [column for _, column, pictures in news[:-1] if pictures]
        assert previewed
        assert all(column.words.endswith("of 30 steps") for column in previewed)
        _, column, pictures = news[-1]
        assert (column.fraction, column.members, column.steps, column.words) == (0.4, "12 small + 18 large", 30, "")
        assert column.shared
        alone = runtime.sample(**{**REQUEST, "steps": 30}, labels=[label], seed=label, fraction=0.4).images
        assert alone is not None
        np.testing.assert_array_equal(pictures[0], alone[0])
        done = [column.done for _, column, _ in news]
        assert done == sorted(done)
        assert done[-1] == 30


def test_each_fraction_is_drawn_alone_so_that_its_time_is_its_own(engine: Engine, ticks: Ticks) -> None:
    news = asyncio.run(drawn(engine, ticks, [0.0, 0.5, 1.0], labels=[1], n=2, seed=0))
    last = {place: (column, pictures) for place, column, pictures in news}
    assert [column.members for column, _ in last.values()] == ["10 large", "5 small + 5 large", "10 small"]
    assert all(sorted(pictures) == [0, 1] for _, pictures in last.values())
    assert not any(column.shared for column, _ in last.values())
    assert max(ticks.lanes) == 2
    first, _, small = (column.ms or 0 for column, _ in last.values())
    assert first > small > 0


def test_a_step_that_a_busy_machine_held_up_does_not_count() -> None:
    times = StepTimes()
    began = time.monotonic()
    for member, seconds in (("large", 0.010), ("large", 0.500), ("large", 0.012), ("small", 0.001)):
        times.ticked(TickInfo("fashion", member, True, (28, 28), 1, 1, seconds, 0.0))
    assert times.milliseconds(began) == pytest.approx(3 * 12 + 1)
    assert times.milliseconds(time.monotonic() + 1) == 0


def test_what_can_t_be_drawn_is_refused(engine: Engine, ticks: Ticks) -> None:
    with pytest.raises(UnknownName, match="solver"):
        asyncio.run(drawn(engine, ticks, [0.0, 0.5], labels=[1], solver="dim"))
    with pytest.raises(BadInput, match="max_queue"):
        asyncio.run(drawn(engine, ticks, [0.0], labels=[1], n=9))

    async def bounded() -> None:
        async for _ in draw_in_turn(
            engine,
            [{**REQUEST, "labels": [1], "steps": 1000, "fraction": 0}],
            ticks,
            check=lambda: None,
            most_seconds=1e-3,
        ):
            pass

    with pytest.raises(Busy, match="drawing at 0% would take about"):
        asyncio.run(bounded())
    room = engine.state().models["fashion"].max_lanes // 8 + 1  # requests of eight images: in lanes, and waiting
    others = [engine.submit(labels=[1], n=8, steps=1000) for _ in range(room)]
    with pytest.raises(Overloaded, match="queue is full"):
        asyncio.run(drawn(engine, ticks, [0.0], labels=[1], n=8))
    for other in others:
        other.cancel()
    wait_idle(engine)


def test_a_closed_page_s_requests_are_cancelled(engine: Engine, ticks: Ticks) -> None:
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.3:
            raise Cancelled("the page was closed", hint="open it again")

    with pytest.raises(Cancelled, match="page was closed"):
        asyncio.run(drawn(engine, ticks, [0.0, 1.0], check, labels=[1], steps=1000))
    wait_idle(engine)


def test_who_waits_is_told_how_long(runtime: Runtime, ticks: Ticks) -> None:
    async def after_another(engine: Engine) -> list[Any]:
        other = engine.submit(labels=[0], steps=1000, fraction=0.0)
        page = asyncio.create_task(drawn(engine, ticks, [0.0], labels=[1]))
        await asyncio.sleep(0.3)
        other.cancel()
        return await page

    with Engine(runtime, max_lanes=1, observer=ticks) as engine:
        news = asyncio.run(after_another(engine))
    assert any(column.words.startswith("waiting for others, drawn in about ") for _, column, _ in news)


def test_the_example_is_drawn_once_and_waits_for_visitors() -> None:
    begun: list[int] = []

    async def draw() -> AsyncIterator[Shown]:
        begun.append(len(begun))
        yield Markup("half"), Markup("table")
        await asyncio.sleep(0 if len(begun) > 1 else 30)
        yield Markup(""), Markup("whole")

    async def visits() -> None:
        example = Example(draw)
        example.start()
        await example.stop()  # before it has begun
        example.start()
        example.start()
        await asyncio.sleep(0.01)
        assert example.shown == ("half", "table")
        await example.stop()
        assert not example.over
        assert example.shown[1] == "table"
        example.start()
        await asyncio.sleep(0.05)
        assert example.over
        assert example.shown == ("", "whole")
        example.start()
        await example.stop()

    asyncio.run(visits())
    assert begun == [0, 1]


def test_an_example_that_can_t_be_drawn_says_why() -> None:
    async def draw() -> AsyncIterator[Shown]:
        raise Busy("drawing at 0% would take about 90 s", hint="draw with fewer steps")
        yield

    async def visit() -> Example:
        example = Example(draw)
        example.start()
        await asyncio.sleep(0.01)
        return example

    example = asyncio.run(visit())
    assert example.over
    assert example.shown[0] == "No example: drawing at 0% would take about 90 s"


def wait_idle(engine: Engine) -> None:
    """Every lane is free again."""
    until = time.monotonic() + 20
    while any(model.open or model.lanes for model in engine.state().models.values()):
        assert time.monotonic() < until, engine.state()
        time.sleep(0.01)
