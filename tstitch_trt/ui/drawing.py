"""One press of the button: a request for each fraction, one after another, and their pictures as they come."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import Busy
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle, LaneEvent
from tstitch_trt.serve.observer import Observer, TickInfo
from tstitch_trt.study.fractions import FractionImages, counts_text

__all__ = ["Column", "StepTimes", "draw_in_turn"]

_LOOK: Final = 0.1  # seconds between two looks at whether the page is still there
_PREVIEWS: Final = 3
_KEPT: Final = 10_000  # batches; a drawing alone has at most some thousands

Pictures = dict[int, NDArray[np.uint8]]
"""By the image's place in its request: uint8 ``[H,W,C]``."""


@dataclass(frozen=True)
class Column:
    """What is known of one fraction. ``members``: ``20 small + 30 large``. ``words``: how far it is, empty at the end.

    ``done`` of ``steps``: of all its images. ``ms``: per image, of its steps at the median time of their kind, without
    decoding; ``None`` until it is drawn. ``shared``: another request was in its batches, so that ``ms`` is the whole
    time of those batches.
    """

    fraction: float
    members: str
    steps: int
    done: int = 0
    words: str = ""
    ms: float | None = None
    shared: bool = False


class StepTimes(Observer):
    """The batches that an engine ran last."""

    def __init__(self) -> None:
        self._ticks: deque[tuple[float, TickInfo]] = deque(maxlen=_KEPT)

    def ticked(self, tick: TickInfo) -> None:
        self._ticks.append((time.monotonic(), tick))

    def milliseconds(self, since: float) -> float:
        """Of all batches since then, each at the median of its kind: what a busy machine adds to some is left out."""
        kinds: dict[tuple[str, bool, int], list[float]] = {}
        for at, tick in self._ticks.copy():
            if at >= since:
                kinds.setdefault((tick.member, tick.guided, tick.lanes), []).append(tick.seconds)
        return 1e3 * sum(len(seconds) * median(seconds) for seconds in kinds.values())


async def draw_in_turn(
    engine: Engine,
    requests: Sequence[Mapping[str, Any]],
    times: StepTimes,
    *,
    check: Callable[[], None],
    most_seconds: float | None = None,
) -> AsyncIterator[tuple[int, Column, Pictures]]:
    """For each of ``requests`` in turn its place, its column and the pictures that are new: previews, then the images.

    In turn, because the time of a batch that several fractions share is that of none of them. ``requests``: keywords of
    ``Engine.submit``, each with its ``fraction``. ``times``: the engine's observer. ``check`` is called all the time:
    what it raises cancels the request.

    Raises what ``submit`` raises, what fails, and ``Busy`` for a request that would take more than ``most_seconds``.
    """
    for place, request in enumerate(requests):
        handle = await asyncio.to_thread(engine.submit, **request, previews=_PREVIEWS)
        news: asyncio.Queue[LaneEvent | None] = asyncio.Queue()
        follower = asyncio.create_task(_follow(handle, news))
        try:
            if most_seconds is not None and handle.estimate > most_seconds:
                raise Busy(
                    f"drawing at {request['fraction']:.0%} would take about {handle.estimate:,.0f} s",
                    hint="draw with fewer steps",
                )
            plan = handle.plan
            column = Column(
                float(request["fraction"]), counts_text(plan.schedule.counts), handle.n * len(plan.schedule)
            )
            reached: dict[int, int] = {}  # a step with a preview may be told twice
            while column.ms is None:
                check()
                pictures: Pictures = {}
                for event in await _next(news):
                    if event is None:
                        drawn = FractionImages(column.fraction, await handle)
                        ms = drawn.ms if column.shared else times.milliseconds(handle.submitted) / handle.n
                        column = replace(column, ms=ms, done=column.steps)
                        pictures = dict(enumerate(drawn.images))
                        break
                    reached[event.image] = max(event.step, reached.get(event.image, 0))
                    column = replace(column, done=sum(reached.values()))
                    if event.preview is not None:
                        pictures[event.image] = event.preview
                column = replace(column, words=_words(column, handle), shared=column.shared or _others(engine, handle))
                yield place, column, pictures
        finally:
            handle.cancel("the page was closed")
            follower.cancel()


def _others(engine: Engine, handle: Handle) -> bool:
    """Whether the engine has another request beside this one, while it goes on."""
    return not handle.done() and engine.state().models[handle.model].open > 1


async def _follow(handle: Handle, news: asyncio.Queue[LaneEvent | None]) -> None:
    async for event in handle:
        news.put_nowait(event)
    news.put_nowait(None)


async def _next(news: asyncio.Queue[LaneEvent | None]) -> list[LaneEvent | None]:
    """All that has come; nothing where nothing does for a while."""
    found = []
    with suppress(TimeoutError):
        found.append(await asyncio.wait_for(news.get(), _LOOK))
    while not news.empty():
        found.append(news.get_nowait())
    return found


def _words(column: Column, handle: Handle) -> str:
    if column.ms is not None:
        return ""
    if column.done:
        return f"{column.done} of {column.steps} steps"
    seconds = handle.submitted + handle.estimate - time.monotonic()
    return f"waiting for others, drawn in about {max(1, round(seconds))} s"
