"""The last stage: pictures of latents, as many at once as have come, while the steps of others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.runtime.lane_runner import Answer
from tstitch_trt.serve.book import Book
from tstitch_trt.serve.handle import LaneEvent
from tstitch_trt.serve.model import Model, Request

__all__ = ["Decoding", "Drawn", "Fault", "Peek"]

_MOST: Final = 16  # images at once

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """A lane that has taken its last step."""

    request: Request
    image: int
    answer: Answer


@dataclass(frozen=True)
class Fault:
    """A lane whose latents were not finite after ``step`` (from 0)."""

    request: Request
    image: int
    step: int


@dataclass(frozen=True)
class Peek:
    """A lane's estimate after ``step`` (from 0)."""

    request: Request
    image: int
    step: int
    read: Callable[[], Array]


class Decoding:
    """``failed`` is told of requests whose latents can't be fetched or decoded."""

    def __init__(self, book: Book, failed: Callable[[Request, Exception], None]) -> None:
        self.queue: SimpleQueue[Drawn | Fault | Peek | None] = SimpleQueue()
        self._book = book
        self._failed = failed

    def run(self) -> None:
        """Until the queue says ``None``."""
        while True:
            batch = [self.queue.get()]
            with suppress(Empty):
                while len(batch) < 4 * _MOST:
                    batch.append(self.queue.get_nowait())
            for one in batch:
                if isinstance(one, Fault) and not one.request.over:
                    self._image_failed(one.request, one.image, one.step)
            wanted = [one for one in batch if isinstance(one, Drawn | Peek)]
            wanted.sort(key=lambda one: isinstance(one, Peek))  # results first
            for start in range(0, len(wanted), _MOST):
                self._decode([one for one in wanted[start : start + _MOST] if not one.request.over])
            if None in batch:
                return

    def _decode(self, wanted: Sequence[Drawn | Peek]) -> None:
        groups: dict[tuple[Model, tuple[int, int]], list[tuple[Drawn | Peek, Array]]] = {}
        for one in wanted:
            request, latents = one.request, None
            try:
                latents = one.read() if isinstance(one, Peek) else self._fetch(one)
            except Exception as error:
                self._failed(request, error)
            if latents is not None:
                groups.setdefault((request.model, request.asked.parsed.size), []).append((one, latents))
        for (model, size), group in groups.items():
            began = time.monotonic()
            try:
                pictures, good = model.runner.decode(np.concatenate([latents for _, latents in group]))
            except Exception as error:
                for request in dict.fromkeys(one.request for one, _ in group):
                    self._failed(request, error)
                continue
            ended = time.monotonic()
            model.stages.observe("decode", size, len(group), ended - began)
            for (one, _), picture in zip(group, pictures, strict=True):
                if isinstance(one, Peek):
                    names = one.request.asked.plan.schedule.names
                    event = LaneEvent(one.image, one.step + 1, len(names), names[one.step], picture)
                    one.request.handle._tell(event)
            for request in dict.fromkeys(one.request for one, _ in group if isinstance(one, Drawn)):
                request.decoding = (min(began, request.decoding[0]), ended)
            for (one, latents), picture, fine in zip(group, pictures, good, strict=True):
                if isinstance(one, Peek):
                    continue
                if fine:
                    self._image_done(one.request, one.image, latents[0], picture)
                else:
                    self._image_failed(one.request, one.image, -1)

    def _fetch(self, one: Drawn) -> Array | None:
        """The latents to decode; ``None`` where that is not wanted, or where they are no good."""
        request = one.request
        latents, fault = request.model.runner.fetch(one.answer)
        if fault >= 0:
            self._image_failed(request, one.image, fault)
        elif request.asked.decode:
            return latents
        else:
            self._image_done(request, one.image, latents[0], None)
        return None

    def _image_failed(self, request: Request, image: int, fault: int) -> None:
        """``fault``: the step (from 0) after which it was not finite, -1 for the decoder."""
        names = request.asked.plan.schedule.names
        error = request.fail(image, fault + 1, names[fault] if fault >= 0 else "vae_decoder")
        if error is not None:
            self._book.end(request.handle, error)
        else:
            self._image_ended(request)

    def _image_done(self, request: Request, image: int, latents: Array, picture: NDArray[np.uint8] | None) -> None:
        request.add(image, latents, picture)
        self._image_ended(request)

    def _image_ended(self, request: Request) -> None:
        request.left -= 1
        if request.left:
            return
        handle, now = request.handle, time.monotonic()
        began, ended = request.decoding
        denoised = min(began, now)
        handle._took(denoise=denoised - request.started_at, decode=max(0.0, ended - began))
        self._book.stage(handle, "denoise", request.started_at, denoised)
        for segment, (first, last) in sorted(request.spans.items()):
            self._book.phase(handle, request.asked.plan.schedule.segments[segment].name, first, last)
        if request.asked.decode:
            self._book.stage(handle, "decode", began, ended)
        self._book.end(handle, request.result())
