"""Pages that draw at once share batches, and each gets the pictures that are drawn for it alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from tstitch_engines.errors import Cancelled, Overloaded, UnknownName
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.serve import Engine, Observer, TickInfo
from tstitch_trt.ui.drawing import Picture, draw_at_once

REQUEST: dict[str, Any] = {"n": 1, "steps": 10, "solver": "ddim", "guidance": 1.5}


class Ticks(Observer):
    def __init__(self) -> None:
        self.lanes: list[int] = []

    def ticked(self, tick: TickInfo) -> None:
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
    engine: Engine, fractions: list[float], check: Callable[[], None] = lambda: None, **request: Any
) -> tuple[list[dict[tuple[int, int], Picture]], list[tuple[str, float]]]:
    said: list[tuple[str, float]] = []
    tell = lambda words, share: said.append((words, share))  # noqa: E731
    requests = [{**REQUEST, **request, "fraction": fraction} for fraction in fractions]
    return [new async for new in draw_at_once(engine, requests, check=check, tell=tell)], said


def test_two_pages_share_batches_and_get_their_own_pictures(engine: Engine, runtime: Runtime, ticks: Ticks) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*(drawn(engine, [0.4], labels=[label], seed=label, steps=30) for label in (3, 5)))

    pages = asyncio.run(both())
    assert max(ticks.lanes) == 2
    assert len(ticks.lanes) < 2 * 30
    engine.close()
    for label, (news, said) in zip((3, 5), pages, strict=True):
        *previews, last = news
        assert next(picture.caption for new in previews for picture in new.values()).startswith("40%: step ")
        (picture,) = last.values()
        assert picture.caption.startswith("40%: 12 small + 18 large, ")
        alone = runtime.sample(**{**REQUEST, "steps": 30}, labels=[label], seed=label, fraction=0.4).images
        assert alone is not None
        np.testing.assert_array_equal(picture.pixels, alone[0])
        shares = [share for _, share in said]
        assert shares == sorted(shares)
        assert any("of 30 steps" in words for words, _ in said)


def test_all_fractions_are_drawn_at_once_or_none(engine: Engine, ticks: Ticks) -> None:
    news, _ = asyncio.run(drawn(engine, [0.0, 0.5, 1.0], labels=[1], n=2, seed=0))
    found = {place: picture for new in news for place, picture in new.items()}
    assert sorted(found) == [(fraction, image) for fraction in range(3) for image in range(2)]
    assert [found[place, 0].caption.split(",")[0] for place in range(3)] == [
        "0%: 10 large", "50%: 5 small + 5 large", "100%: 10 small",
    ]  # fmt: skip
    assert max(ticks.lanes) > 2
    with pytest.raises(UnknownName, match="solver"):
        asyncio.run(drawn(engine, [0.0, 0.5], labels=[1], solver="dim"))
    with pytest.raises(Overloaded, match="queue is full"):
        asyncio.run(drawn(engine, [0.0, 0.25, 0.5, 0.75, 1.0] * 20, labels=[1], n=8, steps=100))
    wait_idle(engine)


def test_a_closed_page_s_requests_are_cancelled(engine: Engine) -> None:
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.3:
            raise Cancelled("the page was closed", hint="open it again")

    with pytest.raises(Cancelled, match="page was closed"):
        asyncio.run(drawn(engine, [0.0, 1.0], check, labels=[1], steps=1000))
    wait_idle(engine)


def test_who_waits_is_told_how_long(runtime: Runtime) -> None:
    async def after_another(engine: Engine) -> list[tuple[str, float]]:
        other = engine.submit(labels=[0], steps=1000, fraction=0.0)
        page = asyncio.create_task(drawn(engine, [0.0], labels=[1]))
        await asyncio.sleep(0.3)
        other.cancel()
        _, said = await page
        return said

    with Engine(runtime, max_lanes=1) as engine:
        said = asyncio.run(after_another(engine))
    assert any("waiting for others, drawn in about " in words for words, _ in said)


def wait_idle(engine: Engine) -> None:
    """Every lane is free again."""
    until = time.monotonic() + 20
    while any(model.open or model.lanes for model in engine.state().models.values()):
        assert time.monotonic() < until, engine.state()
        time.sleep(0.01)
