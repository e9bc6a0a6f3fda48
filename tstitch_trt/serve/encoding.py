"""The first stage: prompts and pictures of the requests that wait, as many at once as there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty
from typing import Final

from tstitch_trt.runtime.lane_program import LaneProgram
from tstitch_trt.serve.book import Book
from tstitch_trt.serve.model import Model, Request

__all__ = ["Encoding"]

_MOST: Final = 32  # requests at once


class Encoding:
    """Hands requests on to ``add`` on the device's thread. ``failed`` is told of those that can't be encoded."""

    def __init__(
        self,
        book: Book,
        add: Callable[[Request, list[LaneProgram]], object],
        failed: Callable[[Request, Exception], None],
    ) -> None:
        self._book = book
        self._add = add
        self._failed = failed

    def run(self) -> None:
        """Until the queue says ``None``."""
        queue = self._book.to_encode
        while True:
            batch = [queue.get()]
            with suppress(Empty):
                while len(batch) < _MOST:
                    batch.append(queue.get_nowait())
            requests = [request for request in batch if request is not None and not request.over]
            for model in dict.fromkeys(request.model for request in requests):
                self._encode(model, [request for request in requests if request.model is model])
            if None in batch:
                return

    def _encode(self, model: Model, requests: Sequence[Request]) -> None:
        began = time.monotonic()
        for request in requests:
            request.handle._enter("encoding")
            if not request.retries:
                self._book.stage(request.handle, "queue", request.arrived, began)
        try:
            found = model.runner.encode([request.asked for request in requests])
        except Exception as error:
            found = [error] * len(requests)
        ended = time.monotonic()
        for request, encoded in zip(requests, found, strict=True):
            if isinstance(encoded, Exception):
                self._failed(request, encoded)
                continue
            try:
                programs = model.runner.programs(request.asked, encoded)
            except Exception as error:
                self._failed(request, error)
                continue
            request.seeds, request.labels, request.prompts = encoded.seeds, encoded.labels, encoded.prompts
            model.stages.observe("encode", request.asked.parsed.size, encoded.n, (ended - began) / len(requests))
            request.encoding = (began, ended)
            self._book.stage(request.handle, "encode", began, ended)
            request.handle._enter("queued")
            self._book.inbox.put(partial(self._add, request, programs))
