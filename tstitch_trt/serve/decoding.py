"""The last stage: pictures of latents, as many at once as have come, while the steps of others go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import first_line
from tstitch_trt.runtime.lane_runner import Answer
from tstitch_trt.serve.book import Book
from tstitch_trt.serve.handle import LaneEvent
from tstitch_trt.serve.model import Model, Request

__all__ = ["Decoding", "Drawn", "Fault", "Peek"]

_log = logging.getLogger(__name__)

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
        """Until the queue says ``None``. What is drawn goes before previews."""
        while True:
            batch = [self.queue.get()]
            with suppress(Empty):
                while len(batch) < 4 * _MOST:
                    batch.append(self.queue.get_nowait())
            for one in batch:
                if isinstance(one, Fault) and not one.request.over:
                    self._image_failed(one.request, one.image, one.step)
            drawn = [one for one in batch if isinstance(one, Drawn)]
            for start in range(0, len(drawn), _MOST):
                self._decode(drawn[start : start + _MOST])
            for one in batch:
                if isinstance(one, Peek) and not one.request.over:
                    self._peek(one)
            if None in batch:
                return

    def _decode(self, drawn: Sequence[Drawn]) -> None:
        groups: dict[tuple[Model, tuple[int, int]], list[tuple[Drawn, Array]]] = {}
        for one in drawn:
            request = one.request
            if request.over:
                continue
            try:
                latents, fault = request.model.runner.fetch(one.answer)
            except Exception as error:
                self._failed(request, error)
                continue
            if fault >= 0:
                self._image_failed(request, one.image, fault)
            elif not request.asked.decode:
                self._image_done(request, one.image, latents[0], None)
            else:
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
            for request in dict.fromkeys(one.request for one, _ in group):
                request.decoding = (min(began, request.decoding[0]), ended)
            for (one, latents), picture, fine in zip(group, pictures, good, strict=True):
                if fine:
                    self._image_done(one.request, one.image, latents[0], picture)
                else:
                    self._image_failed(one.request, one.image, -1)

    def _peek(self, peek: Peek) -> None:
        request, names = peek.request, peek.request.asked.plan.schedule.names
        try:
            pictures, _ = request.model.runner.decode(peek.read())
        except Exception as error:
            _log.warning("no preview: %s", first_line(error))
            return
        request.handle._tell(LaneEvent(peek.image, peek.step + 1, len(names), names[peek.step], preview=pictures[0]))

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
