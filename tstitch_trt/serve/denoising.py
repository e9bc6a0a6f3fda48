"""The stage between: the thread that has the device, and runs one batch of lanes after another."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import ref

from tstitch_engines.errors import BadInput, Closed, DeviceLost, FailedWork, OutOfTime, first_line
from tstitch_trt.runtime.lane_program import LaneProgram
from tstitch_trt.serve.book import Book, request_of
from tstitch_trt.serve.decoding import Decoding, Drawn, Fault, Peek
from tstitch_trt.serve.handle import Handle, LaneEvent
from tstitch_trt.serve.model import Model, Phase, Request
from tstitch_trt.serve.observer import TickInfo
from tstitch_trt.serve.scheduler import Lane, Tick

if TYPE_CHECKING:
    from tstitch_engines.device.base import Stopwatch

__all__ = ["Denoising"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
_LOOK: Final = 0.5  # seconds after which an idle thread looks itself
_AHEAD: Final = 1  # batches that a GPU may be behind with; the host computes them in the call


@dataclass
class _Ran:
    """A batch that was enqueued. ``segments``: those of its requests. ``host``: seconds of the host beside the step."""

    model: Model
    tick: Tick
    segments: set[tuple[Request, int]]
    watch: Stopwatch
    host: float


@dataclass
class _Call:
    """Something that a caller waits for and the device's thread does."""

    work: Callable[[], object]
    done: threading.Event = field(default_factory=threading.Event)
    found: object = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.found = self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


class Denoising:
    """``reopen`` loads a bundle again after its device was lost, on this thread."""

    def __init__(self, book: Book, reopen: Callable[[Model], Model]) -> None:
        self.decoding = Decoding(book, self.failed)
        self._book = book
        self._reopen = reopen
        self._stopping = False
        self._ended = threading.Event()
        self._timeouts: list[tuple[float, int, ref[Handle]]] = []  # one that has ended is kept by nobody here
        self._numbers = itertools.count()
        self._ran: deque[_Ran] = deque()

    # --- for other threads

    def call(self, work: Callable[[], T]) -> T:
        """``work`` on the device's thread, between two batches. Raises what it raises."""
        call = _Call(work)
        self._book.inbox.put(call.run)
        while not call.done.wait(_LOOK):
            if self._ended.is_set() and not call.done.is_set():
                raise self._book.failed or FailedWork("the engine has stopped", hint="make another")
        if call.error is not None:
            raise call.error
        return call.found  # type: ignore[return-value]

    def once_idle(self, model: Model, work: Callable[[], object], timeout: float | None) -> bool:
        """``work`` when all requests to ``model`` that were accepted before have ended; those that come meanwhile wait.

        Whether it was done within ``timeout`` seconds; if not it won't be. Raises what it raises.
        """
        call = _Call(work)
        with self._book.lock:
            model.holding, model.held = True, call.run
        self._book.inbox.put(lambda: None)
        if not call.done.wait(timeout):
            with self._book.lock:
                if model.held is not None:
                    model.held = None
                    self._book.release(model)
                    return False
            call.done.wait()
        if call.error is not None:
            raise call.error
        return True

    def expire_at(self, when: float, handle: Handle) -> None:
        """Ends the request then (``time.monotonic``), unless it has ended."""
        entry = (when, next(self._numbers), ref(handle))
        self._book.inbox.put(lambda: heapq.heappush(self._timeouts, entry))

    def add(self, request: Request, programs: list[LaneProgram]) -> None:
        """An encoded request. On the device's thread."""
        if not request.over:
            request.programs = programs
            images = [(image, program.keys, program.start) for image, program in enumerate(programs)]
            with self._book.lock:
                request.model.scheduler.add(request, images, time.monotonic())

    def failed(self, request: Request, error: Exception) -> None:
        """A request can't be drawn. On any thread; whether the device is to blame is asked on its own."""
        if isinstance(error, BadInput):
            self._book.end(request.handle, error)
        else:
            self._book.inbox.put(lambda: self._failed([request], error))

    def stop(self) -> None:
        """Ends ``run`` when no request is open."""
        self._stopping = True
        self._book.inbox.put(lambda: None)

    # --- the thread

    def run(self) -> None:
        book = self._book
        try:
            while not (self._stopping and not book.requests):
                self._read_inbox()
                self._expire()
                model = self._next()
                if model is not None:
                    self._tick(model)
                elif self._ran:
                    self._account(self._ran.popleft())
                for each in list(book.every_model()):
                    if each.warming is not None and not each.scheduler.groups():
                        self._warm(each)
                    if each.held is not None:
                        self._run_held(each)
                for each in list(book.leaving):
                    self._let_go(each)
        finally:
            self._ended.set()
            for each in book.every_model():
                with suppress(Exception):
                    each.leave()

    def _read_inbox(self) -> None:
        """Does what other threads have sent, and waits for it where there is nothing else to do."""
        wait = not (self._ran or self._stopping) and not any(
            model.warming is not None or not model.scheduler.idle for model in self._book.every_model()
        )
        while True:
            try:
                work = self._book.inbox.get(timeout=self._until_timeout()) if wait else self._book.inbox.get_nowait()
            except Empty:
                return
            wait = False
            work()

    def _until_timeout(self) -> float:
        return min(_LOOK, max(0.0, self._timeouts[0][0] - time.monotonic())) if self._timeouts else _LOOK

    def _expire(self) -> None:
        now = time.monotonic()
        while self._timeouts and self._timeouts[0][0] <= now:
            handle = heapq.heappop(self._timeouts)[2]()
            if handle is not None and not handle.done():
                took = now - handle.submitted
                late = OutOfTime(f"the request has not ended after {took:.3g} s", hint="give a longer timeout=")
                self._book.end(handle, late)

    def _next(self) -> Model | None:
        """The bundle that is to run next: the one that has had the least of its share."""
        models = list(self._book.every_model())
        ready = [m for m in models if m.scheduler.groups() or (m.warming is None and not m.scheduler.idle)]
        if not ready:
            return None
        chosen = min(ready, key=lambda model: model.clock)
        for model in models:
            if model.scheduler.idle:  # it does not save up for later
                model.clock = max(model.clock, chosen.clock)
        return chosen

    def _tick(self, model: Model) -> None:
        began, now = time.perf_counter(), time.monotonic()
        with self._book.lock:
            admitted = model.scheduler.admit(now) if model.warming is None else []
        for lane in admitted:
            self._start(model, lane, now)
        with self._book.lock:
            tick = model.scheduler.choose(now)
        if tick is None:
            return
        key: Any = tick.key
        slots = [lane.slot for lane in tick.lanes]
        segments = {(request, request.segments[lane.step]) for lane in tick.lanes for request in [request_of(lane)]}
        chosen = time.perf_counter()
        try:
            watch = model.runner.step(key, slots)
            stepped, ended = time.perf_counter(), time.monotonic()
            for request, segment in segments:
                request.spans[segment] = (request.spans.get(segment, (now, now))[0], ended)
            self._move_on(model, tick, slots)
        except Exception as error:
            self._step_failed(model, tick, error)
            return
        self._ran.append(_Ran(model, tick, segments, watch, chosen - began + time.perf_counter() - stepped))
        while len(self._ran) > (0 if model.runner.synchronous else _AHEAD):
            self._account(self._ran.popleft())

    def _start(self, model: Model, lane: Lane, now: float) -> None:
        request = request_of(lane)
        try:
            model.runner.start(lane.slot, request.programs[lane.image])
        except Exception as error:
            self._book.drop(model, [lane])
            self.failed(request, error)
            return
        if self._book.started(request) and not request.over:
            request.handle._enter("denoising")
            request.started_at = now
            began, encoded = request.encoding
            request.handle._took(queued=began - request.arrived + now - encoded, encode=encoded - began)
            self._book.stage(request.handle, "queue", encoded, now)
            self._book.tell(lambda observer: observer.started(request.handle))

    def _move_on(self, model: Model, tick: Tick, slots: list[int]) -> None:
        """The lanes of a batch that was enqueued have taken their step."""
        key: Any = tick.key
        faulty = dict(model.runner.faulty(slots))
        ended = [lane for lane in tick.lanes if lane.left == 1 and lane.slot not in faulty]
        for lane in tick.lanes:
            request, step = request_of(lane), lane.step
            if lane.slot in faulty:
                self.decoding.queue.put(Fault(request, lane.image, faulty[lane.slot]))
                continue
            request.handle._tell(LaneEvent(lane.image, step + 1, len(lane.keys), key.member))
            if step in request.previews and lane.left > 1:
                read = model.runner.estimate(request.asked, lane.slot, step)
                self.decoding.queue.put(Peek(request, lane.image, step, read))
        if ended:
            answers = model.runner.answers([(lane.slot, request_of(lane).asked.parsed.size) for lane in ended])
            for lane, answer in zip(ended, answers, strict=True):
                self.decoding.queue.put(Drawn(request_of(lane), lane.image, answer))
        bad = [lane for lane in tick.lanes if lane.slot in faulty]
        with self._book.lock:
            model.scheduler.ran(tick, time.monotonic())
            model.scheduler.drop(bad)

    def _account(self, ran: _Ran) -> None:
        """Waits for a batch, and takes its time down."""
        model, lanes, phase = ran.model, ran.tick.lanes, Phase.of(ran.tick.key)
        try:
            seconds = ran.watch.milliseconds()[0] / 1e3
        except Exception as error:
            self._step_failed(model, ran.tick, error)
            return
        model.clock += seconds / model.weight
        model.costs.observe(phase, len(lanes), seconds)
        for request, segment in ran.segments:
            request.seconds[segment] += seconds
        bucket = model.runner.bucket(phase, len(lanes))
        self._book.ticked(
            TickInfo(model.name, phase.member, phase.guided, phase.size, len(lanes), bucket, seconds, ran.host)
        )

    def _warm(self, model: Model) -> None:
        """One piece of it, so that other bundles' steps go on in between."""
        assert model.warming is not None, "asked before"
        try:
            timed, model.warmed = next(model.warming)
            if timed is not None:
                model.costs.observe(Phase.of(timed.key), timed.lanes, timed.seconds)
            return
        except StopIteration:
            model.warming = None
        except Exception as error:
            model.warming, model.warm_error = None, error
        with self._book.changed:
            self._book.changed.notify_all()

    def _let_go(self, model: Model) -> None:
        """Of a bundle that was replaced, once its requests have ended."""
        with self._book.lock:
            if self._book.of(model):
                return
            self._book.leaving.remove(model)
        try:
            model.leave()
        except Exception:
            _log.exception("%s, which was replaced, could not be closed", model.name)

    def _run_held(self, model: Model) -> None:
        """Once all requests have ended but those that were held back."""
        with self._book.lock:
            if len(self._book.of(model)) > len(model.aside):
                return
            held, model.held = model.held, None
        if held is not None:
            held()
            with self._book.lock:
                self._book.release(model)

    # --- what goes wrong

    def _step_failed(self, model: Model, tick: Tick, error: Exception) -> None:
        """The requests that had lanes in the batch fail, the others go on."""
        _log.warning("a step of %d lanes of %s failed: %s", len(tick.lanes), model.name, first_line(error))
        self._failed(list(dict.fromkeys(map(request_of, tick.lanes))), error)

    def _failed(self, requests: list[Request], error: Exception) -> None:
        """Requests of one bundle."""
        model = requests[0].model
        if model not in self._book.every_model():
            return  # its device was lost, and they began again or failed
        if model.runner.closed:
            self._book.give_up(
                Closed(f"the runtime of {model.name!r} was closed under the engine", hint="close the engine first")
            )
            return
        if isinstance(error, DeviceLost) or (why := model.runner.lost()) is None:
            lost = error if isinstance(error, DeviceLost) else None
        else:
            lost = DeviceLost(f"the device is lost: {why}", hint="start the process again")
        if lost is not None:
            self._device_lost(model, lost)
            return
        for request in requests:
            self._book.end(request.handle, error)

    def _device_lost(self, model: Model, error: DeviceLost) -> None:
        """Loads the bundle again and begins anew with what was not answered; a request that this happens to twice
        fails."""
        book = self._book
        _log.error("the device is lost: %s", first_line(error))
        self._ran.clear()
        if model.warming is not None:
            model.warming, model.warm_error = None, error
        with suppress(Exception):
            model.leave()
        try:
            again = self._reopen(model)
        except Exception as second:
            book.give_up(
                FailedWork(
                    f"the device is lost, and this process can't use it again: {first_line(second)}",
                    hint="start the process again",
                )
            )
            return
        with book.lock:
            again.clock, again.holding, again.held = model.clock, model.holding, model.held
            for models in (book.joining, book.leaving):
                if model in models:
                    models[models.index(model)] = again
            if book.models.get(model.name) is model:
                book.models = {**book.models, model.name: again}
            requests = [request for request in book.requests.values() if request.model is model]
        for request in requests:
            if request.retries:
                book.end(request.handle, error)
            else:
                book.again(request, again)
