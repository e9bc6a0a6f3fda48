"""One press of the button: a request for each fraction, one after another, and their pictures as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import Busy
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle, LaneEvent
from tstitch_trt.study.fractions import FractionImages, counts_text

__all__ = ["Column", "draw_in_turn"]

_LOOK: Final = 0.1  # seconds between two looks at whether the page is still there
_PREVIEWS: Final = 3

Pictures = dict[int, NDArray[np.uint8]]
"""By the image's place in its request: uint8 ``[H,W,C]``."""


@dataclass(frozen=True)
class Column:
    """What is known of one fraction. ``members``: ``20 small + 30 large``. ``words``: how far it is, empty at the end.

    ``done`` of ``steps``: of all its images. ``ms``: per image, of its steps, without decoding; ``None`` until it is
    drawn. ``shared``: another request was in its batches, so that ``ms`` is not the time of this fraction alone.
    """

    fraction: float
    members: str
    steps: int
    done: int = 0
    words: str = ""
    ms: float | None = None
    shared: bool = False


async def draw_in_turn(
    engine: Engine,
    requests: Sequence[Mapping[str, Any]],
    *,
    check: Callable[[], None],
    most_seconds: float | None = None,
) -> AsyncIterator[tuple[int, Column, Pictures]]:
    """For each of ``requests`` in turn its place, its column and the pictures that are new: previews, then the images.

    In turn, because the time of a batch that several fractions share is that of none of them. ``requests``: keywords of
    ``Engine.submit``, each with its ``fraction``. ``check`` is called all the time: what it raises cancels the request.

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
                        column = replace(column, ms=drawn.ms, done=column.steps)
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
