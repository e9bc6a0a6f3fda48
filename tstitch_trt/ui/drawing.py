"""One press of the button: a request for each fraction, all at once, and their pictures as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle, LaneEvent
from tstitch_trt.study.fractions import FractionImages

__all__ = ["Picture", "draw_at_once"]

_LOOK: Final = 0.1  # seconds between two looks at whether the page is still there
_PREVIEWS: Final = 3


@dataclass(frozen=True)
class Picture:
    """``pixels``: uint8 ``[H,W,C]``."""

    pixels: NDArray[np.uint8]
    caption: str


async def draw_at_once(
    engine: Engine,
    requests: Sequence[Mapping[str, Any]],
    *,
    check: Callable[[], None],
    tell: Callable[[str, float], None],
) -> AsyncIterator[dict[tuple[int, int], Picture]]:
    """The pictures that are new, by the request's place and the image's: previews, and then the image in their place.

    ``requests``: keywords of ``Engine.submit``, each with its ``fraction``. ``check`` is called all the time: what it
    raises cancels the requests. ``tell``: words and the share of the steps that is done. Raises what ``submit`` raises
    before anything is drawn, and what fails.
    """
    fractions = [float(request["fraction"]) for request in requests]
    handles = await asyncio.to_thread(_submitted, engine, requests)
    news: asyncio.Queue[tuple[int, LaneEvent | None]] = asyncio.Queue()
    followers = [asyncio.create_task(_follow(place, handle, news)) for place, handle in enumerate(handles)]
    try:
        steps = sum(handle.n * len(handle.plan.schedule) for handle in handles)
        done, left = 0, len(handles)
        while left:
            check()
            tell(_words(handles, done, steps), min(1.0, done / steps))
            new: dict[tuple[int, int], Picture] = {}
            for place, event in await _next(news):
                if event is None:
                    drawn = FractionImages(fractions[place], await handles[place])
                    caption = f"{drawn.fraction:.0%}: {drawn.members}, {drawn.ms:,.0f} ms per image"
                    new.update({(place, i): Picture(image, caption) for i, image in enumerate(drawn.images)})
                    left -= 1
                    continue
                done += 1
                if event.preview is not None:
                    caption = f"{fractions[place]:.0%}: step {event.step} of {event.steps}"
                    new[place, event.image] = Picture(event.preview, caption)
            if new:
                yield new
    finally:
        for handle in handles:
            handle.cancel("the page was closed")
        for follower in followers:
            follower.cancel()


def _submitted(engine: Engine, requests: Sequence[Mapping[str, Any]]) -> list[Handle]:
    """All of them or none."""
    handles: list[Handle] = []
    try:
        for request in requests:
            handles.append(engine.submit(**request, previews=_PREVIEWS))  # noqa: PERF401
    except BaseException:
        for handle in handles:
            handle.cancel("another fraction was refused")
        raise
    return handles


async def _follow(place: int, handle: Handle, news: asyncio.Queue[tuple[int, LaneEvent | None]]) -> None:
    async for event in handle:
        news.put_nowait((place, event))
    news.put_nowait((place, None))


async def _next(news: asyncio.Queue[tuple[int, LaneEvent | None]]) -> list[tuple[int, LaneEvent | None]]:
    """All that has come; nothing where nothing does for a while."""
    found = []
    with suppress(TimeoutError):
        found.append(await asyncio.wait_for(news.get(), _LOOK))
    while not news.empty():
        found.append(news.get_nowait())
    return found


def _words(handles: Sequence[Handle], done: int, steps: int) -> str:
    if done:
        return f"{done} of {steps} steps"
    now = time.monotonic()
    seconds = max(handle.submitted + handle.estimate - now for handle in handles)
    return f"waiting for others, drawn in about {max(1, round(seconds))} s"
