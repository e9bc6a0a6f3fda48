"""What an engine has taken on: its bundles, and the requests that have not ended. Any thread may ask."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

from tstitch_engines.errors import Closed
from tstitch_trt.runtime.result import Result
from tstitch_trt.serve.admission import Admitted, Offer, Refused
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.model import Model, Request
from tstitch_trt.serve.observer import Observer, Rejection, Stage, TickInfo
from tstitch_trt.serve.scheduler import Lane

__all__ = ["Book", "request_of"]

_log = logging.getLogger(__name__)


class Book:
    """``lock`` guards it and every scheduler; it is never held while an engine runs or an observer is told.

    ``inbox``: what the device's thread is to do. ``to_encode``: requests on their way.
    """

    def __init__(self, observer: Observer) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.models: Mapping[str, Model] = {}
        self.joining: list[Model] = []  # that are warmed up to replace others
        self.leaving: list[Model] = []  # that were replaced and have requests
        self.requests: dict[Handle, Request] = {}
        self.draining = False
        self.failed: Exception | None = None
        self.inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.to_encode: SimpleQueue[Request | None] = SimpleQueue()
        self._observer = observer

    def every_model(self) -> Iterator[Model]:
        yield from self.models.values()
        yield from self.joining
        yield from self.leaving

    def of(self, model: Model) -> list[Request]:
        """The open requests to a bundle. With the lock held."""
        return [request for request in self.requests.values() if request.model is model]

    def check_open(self) -> None:
        """Raises ``Closed``."""
        if self.failed is not None:
            raise Closed(str(self.failed), hint="start the process again")
        if self.draining:
            raise Closed("the engine takes no requests any more", hint="ask another, or start it again")

    # --- the life of a request

    def ask(self, model: Model, offers: list[Offer], now: float, budget: float | None) -> Admitted | Refused:
        """With the lock held. Raises ``Closed``."""
        self.check_open()
        return model.admission.admit(offers, model.load(self.of(model)), now, budget=budget)

    def accept(self, request: Request) -> None:
        """With the lock held, after ``ask``."""
        self.requests[request.handle] = request
        if request.model.holding:
            request.model.aside.append(request)
        else:
            self.to_encode.put(request)

    def started(self, request: Request) -> bool:
        """One of its images has a lane. Whether it is the first."""
        with self.lock:
            request.unstarted -= 1
            return request.unstarted + 1 == request.handle.n

    def drop(self, model: Model, lanes: Iterable[Lane]) -> None:
        """Ends lanes early."""
        with self.lock:
            model.scheduler.drop(list(lanes))

    def end(self, handle: Handle, outcome: Any) -> None:
        """``outcome``: a result or an error. Does nothing where the request has ended. Its lanes are free at the next
        step."""
        with self.changed:
            request = self.requests.pop(handle, None)
            if request is None:
                return
            if request in request.model.aside:
                request.model.aside.remove(request)
            if request.deadline is not None and isinstance(outcome, Result):
                request.model.admission.ended(met=time.monotonic() <= request.deadline)
            self.changed.notify_all()
        handle._finish(outcome)
        self.inbox.put(lambda: self.drop(request.model, request.lanes))
        self.tell(lambda observer: observer.finished(handle))

    def end_all(self, error: Exception) -> None:
        for handle in list(self.requests):
            self.end(handle, error)

    def again(self, request: Request, model: Model) -> None:
        """Begins a request anew, on a bundle that was loaded again."""
        with self.lock:
            if self.requests.get(request.handle) is not request:
                return
            renewed = self.requests[request.handle] = request.again(model)
            self.to_encode.put(renewed)

    def give_up(self, error: Exception) -> None:
        """Nothing is drawn any more."""
        _log.error("%s", error)
        with self.changed:
            self.failed = self.failed or error
            self.changed.notify_all()
        self.end_all(error)

    def release(self, model: Model) -> None:
        """Lets requests that came while it was held go on. With the lock held."""
        model.holding = False
        for request in model.aside:
            self.to_encode.put(request)
        model.aside = []

    # --- telling

    def stage(self, handle: Handle, name: Stage, began: float, ended: float) -> None:
        self.tell(lambda observer: observer.stage(handle, name, began, ended))

    def phase(self, handle: Handle, member: str, began: float, ended: float) -> None:
        self.tell(lambda observer: observer.phase(handle, member, began, ended))

    def ticked(self, info: TickInfo) -> None:
        self.tell(lambda observer: observer.ticked(info))

    def rejected(self, why: Rejection, model: Model) -> None:
        self.tell(lambda observer: observer.rejected(why, model.name))

    def tell(self, what: Callable[[Observer], object]) -> None:
        try:
            what(self._observer)
        except Exception:
            _log.exception("an observer failed")


def request_of(lane: Lane) -> Request:
    assert isinstance(lane.job, Request), "the engine's own"
    return lane.job
