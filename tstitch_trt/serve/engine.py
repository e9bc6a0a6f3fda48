"""The batching engine: one thread owns the device and runs the steps of many requests in shared batches.

Three threads: requests are encoded on one, denoised on the next and decoded on the last, so that none of the stages
waits for another request's. The one in the middle has the lanes to itself; the others send it what is to be done.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, Unpack
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.checks import (
    check_number,
    check_switch,
    check_text,
    check_whole,
    checked,
    optional,
    shown,
    taken_as_is,
)
from tstitch_engines.child import parse_size
from tstitch_engines.errors import (
    BadInput,
    Busy,
    Closed,
    DeviceLost,
    FailedWork,
    OutOfTime,
    first_line,
    unknown_name,
)
from tstitch_trt.request.limits import MOST_IMAGES
from tstitch_trt.request.options import SampleKeywords, SampleOptions
from tstitch_trt.runtime.chooser import check_budget
from tstitch_trt.runtime.lane_runner import Answer
from tstitch_trt.runtime.load import load as load_runtime
from tstitch_trt.runtime.lora import LoraFiles
from tstitch_trt.runtime.runtime import MOST_LANES, Runtime
from tstitch_trt.runtime.work_queue import check_timeout
from tstitch_trt.serve.handle import Handle, LaneEvent
from tstitch_trt.serve.model import Model, Phase, Request, preview_steps
from tstitch_trt.serve.observer import EngineState, ModelState, Observer, TickInfo
from tstitch_trt.serve.policy import DeadlineFirst
from tstitch_trt.serve.scheduler import Lane, Policy, Tick

if TYPE_CHECKING:
    from tstitch_engines.device.base import Stopwatch
    from tstitch_engines.progress import Progress

__all__ = ["Engine", "Source"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
Source = Runtime | Bundle | str | Path
MOST_PREVIEWS: Final = 50
_LOOK: Final = 0.5  # seconds after which an idle thread looks itself
_ENCODED: Final = 32  # requests encoded at once
_DECODED: Final = 16  # images decoded at once
_AHEAD: Final = 1  # batches that a device may be behind with; the host computes them in the call
_EXIT_SECONDS: Final = 5.0


@dataclass(frozen=True)
class _Drawn:
    """A lane that has taken its last step."""

    request: Request
    image: int
    answer: Answer


@dataclass(frozen=True)
class _Peek:
    """A lane's estimate after ``step`` (from 0)."""

    request: Request
    image: int
    step: int
    read: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class _Fault:
    """A lane whose latents were not finite after ``step`` (from 0)."""

    request: Request
    image: int
    step: int


@dataclass
class _Ran:
    """A batch that was enqueued. ``host``: seconds of the host beside the step. ``segments``: which requests took part,
    and each with which segments of its schedule."""

    model: Model
    tick: Tick
    watch: Stopwatch
    host: float
    segments: set[tuple[Request, int]]


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


class Engine:
    """Draws for many callers at once, over one bundle or several by name.

    ``source``: a runtime, which the engine has to itself until it is closed, or what ``tstitch_trt.load`` takes, with
    the keywords ``load``; or a mapping of names to those. ``max_lanes``: images of a bundle that are drawn at once, by
    default twice its largest batch. ``policy``: makes what chooses the batches of one bundle (``serve.policy``).
    ``weights``: shares of the device among bundles, 1 by default. ``max_queue`` and ``max_queue_bytes``: images that
    wait for a lane, and what their requests hold on the host; more are refused with ``Overloaded``.

    Every image is the one that ``Runtime.sample`` draws alone: bit for bit where its batches were padded to the same
    sizes, else within the engines' rounding (1e-4 relative in fp32). Raises what ``load`` raises, and ``Busy`` for a
    runtime that somebody uses. Not run on a GPU.
    """

    @checked(
        source=taken_as_is,
        max_lanes=optional(partial(check_whole, low=1, high=MOST_LANES)),
        policy=taken_as_is,
        weights=taken_as_is,
        max_queue=partial(check_whole, low=1, high=MOST_IMAGES),
        max_queue_bytes=taken_as_is,
        load=taken_as_is,
        observer=taken_as_is,
    )
    def __init__(
        self,
        source: Source | Mapping[str, Source],
        *,
        max_lanes: int | None = None,
        policy: Callable[[], Policy] = DeadlineFirst,
        weights: Mapping[str, float] | None = None,
        max_queue: int = 256,
        max_queue_bytes: int | str = "2GiB",
        load: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.observer = observer or Observer()
        self.max_queue = max_queue
        self.max_queue_bytes = parse_size(max_queue_bytes, "max_queue_bytes", "--max-queue-bytes 2GiB")
        self._max_lanes = max_lanes
        self._policy = policy
        self._load = dict(load or {})
        self._weights = {name: check_number(w, f"weight of {name}", 1e-3, 1e3) for name, w in (weights or {}).items()}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._models: dict[str, Model] = {}
        self._leaving: list[Model] = []
        self._draining = False
        self._stopping = False
        self._failed: Exception | None = None
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._to_encode: SimpleQueue[Request | None] = SimpleQueue()
        self._to_decode: SimpleQueue[_Drawn | _Peek | _Fault | None] = SimpleQueue()
        self._timeouts: list[tuple[float, int, Handle]] = []
        self._numbers = itertools.count()
        self._ran: deque[_Ran] = deque()
        self._requests: dict[Handle, Request] = {}  # those that have not ended
        sources = source if isinstance(source, Mapping) else {None: source}
        for name in self._weights:
            if isinstance(source, Mapping) and name not in source:
                raise unknown_name("model", name, source)
        models = [self._open(name, each) for name, each in sources.items()]
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"tstitch-{name}", daemon=True)
            for name, work in (("encode", self._encode), ("denoise", self._denoise), ("decode", self._decode))
        ]
        _OPEN.add(self)
        for thread in self._threads:
            thread.start()
        try:
            for model in models:
                self._call(partial(self._adopt, model))
        except BaseException:
            self.close(cancel=True)
            raise

    # --- what it is

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._models)

    def runtime(self, model: str | None = None) -> Runtime:
        """For its facts (manifest, limits, plan...): every call that needs its engines waits until this is closed."""
        return self._model(model).runtime

    def state(self) -> EngineState:
        """A snapshot. Waits for nobody."""
        models = {
            name: ModelState(
                lanes=sum(model.lanes_by_member.values()),
                max_lanes=model.max_lanes,
                waiting_images=model.waiting_images,
                waiting_bytes=model.waiting_bytes,
                lanes_by_member=model.lanes_by_member,
                open=model.open,
                backlog_seconds=model.backlog,
                warm=model.warming is None,
            )
            for name, model in self._models.copy().items()
        }
        failed = None if self._failed is None else str(self._failed)
        ready = failed is None and not self._draining and all(model.warm for model in models.values())
        return EngineState(ready=ready, draining=self._draining, failed=failed, models=models)

    # --- requests

    @checked(
        others=True,
        options=taken_as_is,
        model=optional(partial(check_text, example="fashion", most=1000)),
        decode=optional(check_switch),
        previews=partial(check_whole, low=0, high=MOST_PREVIEWS),
        latency_budget_ms=optional(check_budget),
        priority=partial(check_whole, low=-100, high=100),
        partial=check_switch,
        timeout=check_timeout,
        request_id=optional(partial(check_text, example="a1b2c3", most=200)),
    )
    def submit(
        self,
        options: SampleOptions | None = None,
        /,
        *,
        model: str | None = None,
        decode: bool | None = None,
        previews: int = 0,
        latency_budget_ms: float | None = None,
        priority: int = 0,
        partial: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
        **keywords: Unpack[SampleKeywords],
    ) -> Handle:
        """Accepts a request and returns at once, from any thread or event loop.

        ``options`` or ``keywords``: as ``Runtime.sample`` gets them. ``model``: the bundle's name, where there are
        several. ``previews``: pictures of each image on its way, spread over its steps. ``latency_budget_ms``: the
        request is accepted only if it is expected to end within. ``priority``: higher goes first, -100 to 100.
        ``partial``: as of ``sample``. ``timeout``: seconds after which the request fails with ``OutOfTime``.

        Raises ``BadInput`` and its kinds for a request that can't be right, ``Overloaded`` with the seconds after
        which to try again, and ``Closed`` while the engine drains and afterwards. An iterator among the keywords is
        read before this returns.
        """
        if options is not None and keywords:
            raise BadInput(
                f"both options and {', '.join(keywords)} were given", hint="give SampleOptions, or keywords alone"
            )
        asked = SampleOptions.from_keywords(keywords) if options is None else options
        if not isinstance(asked, SampleOptions):
            raise BadInput(f"options is {shown(asked)}; needed is a SampleOptions", hint="or give keywords: labels=[1]")
        chosen = self._model(model)
        events = previews > 0
        job = chosen.runner.job(asked, decode=decode, events=events, partial=partial)
        if job.parsed.n > self.max_queue:
            raise BadInput(
                f"{job.parsed.n:,} images in one request; allowed are {self.max_queue:,} (max_queue)",
                hint="ask for the images in several requests",
            )
        start = job.plan.start if job.parsed.init is not None else job.parsed.start_step
        now = time.monotonic()
        handle = Handle(
            request_id or secrets.token_hex(8),
            chosen.name,
            job.plan,
            asked,
            job.parsed.n,
            priority=priority,
            deadline=None if latency_budget_ms is None else now + latency_budget_ms / 1e3,
            adapted=None,
            estimate=0.0,
            cancel=self._end,
        )
        request = Request(
            arrived=now,
            priority=priority,
            deadline=handle.deadline,
            handle=handle,
            model=chosen,
            asked=job,
            previews=preview_steps(start, len(job.plan.schedule), previews),
            nbytes=chosen.request_bytes(job),
        )
        for phase in request.steps:
            chosen.runner.bucket(phase, 1)
        self._accept(request, timeout)
        return handle

    def _accept(self, request: Request, timeout: float | None) -> None:
        model, handle = request.model, request.handle
        with self._lock:
            self._check_open()
            self._admit(request)
            self._requests[handle] = request
            model.open += 1
            model.waiting_images += request.unstarted
            model.waiting_bytes += request.nbytes
            model.left.update(request.steps)
            held = model.holding
            if held:
                model.aside.append(request)
        self._tell("submitted", handle)
        if timeout is not None:
            entry = (time.monotonic() + timeout, next(self._numbers), handle)
            self._inbox.put(lambda: heapq.heappush(self._timeouts, entry))
        if not held:
            self._to_encode.put(request)

    def _admit(self, request: Request) -> None:
        """Raises ``Overloaded``."""

    # --- the whole

    def warm_up(self, progress: Progress | None = None) -> None:
        """Runs every kind of step once at every size of batch that it may have, so that no request waits for that.

        Of the bundles' own picture sizes. Waits; requests are taken meanwhile and drawn afterwards.
        """
        models = list(self._models.values())
        for model in models:
            self._call(partial(self._begin_warming, model))
        tell = progress or (lambda phase, share: None)
        self._await_warm(models, tell)

    def _await_warm(self, models: Sequence[Model], tell: Progress) -> None:
        while True:
            with self._changed:
                self._changed.wait(0.1)
                if self._failed is not None:
                    raise self._failed
                for model in models:
                    if model.warm_error is not None:
                        raise model.warm_error
                share = sum(model.warmed for model in models) / max(1, len(models))
                over = all(model.warming is None for model in models)
            tell("warming up", 1.0 if over else share)
            if over:
                return

    def replace(self, model: str | None, source: Source) -> None:
        """Loads ``source`` beside the bundle that is served as ``model``, and lets it take over between requests.

        Those that were accepted before end on the old one, which is then let go of. Where this raises, the old one
        goes on. Waits until the new one has taken over.
        """
        old = self._model(model)
        new = self._open(old.name, source)
        try:
            self._call(partial(self._prepare, new))
            if old.was_warmed:
                self._call(partial(self._begin_warming, new))
                self._await_warm([new], lambda phase, share: None)
            self._call(partial(self._take_over, old, new))
        except BaseException:
            with suppress(Exception):
                self._call(new.leave)
            raise

    def swap_lora(self, name: str, files: LoraFiles, *, model: str | None = None, timeout: float | None = None) -> None:
        """``Runtime.swap_lora`` for all requests from now on: those that were accepted before end first.

        Raises as that, and ``Busy`` when they have not ended after ``timeout`` seconds; nothing is swapped then.
        """
        chosen = self._model(model)
        self._once_idle(chosen, lambda: chosen.runtime.swap_lora(name, files), timeout)

    def restore_lora(self, name: str | None = None, *, model: str | None = None, timeout: float | None = None) -> None:
        """Takes out what ``swap_lora`` put in, likewise."""
        chosen = self._model(model)
        self._once_idle(chosen, lambda: chosen.runtime.restore(name), timeout)

    def _once_idle(self, model: Model, work: Callable[[], None], timeout: float | None) -> None:
        wait = check_timeout(timeout)
        call = _Call(work)
        with self._lock:
            self._check_open()
            if model.holding:
                raise Busy("another change of adapters waits for its turn", hint="try again when it is done")
            model.holding, model.held = True, call.run
        self._inbox.put(lambda: None)
        if not call.done.wait(wait):
            with self._lock:
                late = model.held is not None
                if late:
                    model.held = None
                    self._release(model)
            if late:
                raise Busy(
                    f"requests that were accepted before have not ended after {wait:g} s", hint="give a longer timeout="
                )
            call.done.wait()
        if call.error is not None:
            raise call.error

    def _release(self, model: Model) -> None:
        """Lets requests that came meanwhile go on. With the lock held."""
        model.holding = False
        for request in model.aside:
            self._to_encode.put(request)
        model.aside = []

    def drain(self) -> None:
        """Refuses requests from now on. Those that were accepted are drawn."""
        with self._lock:
            self._draining = True

    @checked(cancel=check_switch, timeout=check_timeout)
    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Refuses requests, waits for those that were accepted, or with ``cancel`` ends them; gives the runtimes back,
        and closes those that the engine loaded itself.

        Raises ``Busy`` after ``timeout`` seconds; the engine then still draws what it has, and another call closes it.
        """
        self.drain()
        if cancel:
            self._end_all(Closed("the engine was closed", hint="ask again, of an engine that is open"))
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._requests:
                left = _LOOK if until is None else min(_LOOK, until - time.monotonic())
                if left <= 0:
                    raise Busy(
                        f"{len(self._requests)} requests have not ended after {timeout:g} s",
                        hint="close(cancel=True) cancels them",
                    )
                self._changed.wait(left)
        self._stopping = True
        for queue in (self._to_encode, self._to_decode):
            queue.put(None)
        self._inbox.put(lambda: None)
        me = threading.current_thread()
        for thread in self._threads:
            if thread is not me and thread.ident is not None:
                thread.join(None if until is None else max(0.1, until - time.monotonic()))
        _OPEN.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    # --- models

    def _model(self, name: str | None) -> Model:
        models = self._models
        if name is None:
            if len(models) == 1:
                return next(iter(models.values()))
            self._check_open()
            raise BadInput(f"several models are served: {', '.join(models)}", hint="say which: model=")
        if name not in models:
            self._check_open()
            raise unknown_name("model", name, models)
        return models[name]

    def _open(self, name: str | None, source: Source) -> Model:
        """Loads it, where it is no runtime."""
        owned = not isinstance(source, Runtime)
        runtime = source if isinstance(source, Runtime) else load_runtime(source, **self._load)
        known = runtime.manifest.name if name is None else check_text(name, "model", example="fashion", most=1000)
        return Model(
            known, runtime, source=source, owned=owned, weight=self._weights.get(known, 1.0),
            max_lanes=self._max_lanes, policy=self._policy,
        )  # fmt: skip

    def _prepare(self, model: Model) -> None:
        model.enter()

    def _adopt(self, model: Model) -> None:
        model.enter()
        self._models = {**self._models, model.name: model}

    def _take_over(self, old: Model, new: Model) -> None:
        new.clock = old.clock
        with self._lock:
            self._models = {**self._models, old.name: new}
            self._leaving.append(old)

    def _begin_warming(self, model: Model) -> None:
        model.was_warmed, model.warmed, model.warm_error = True, 0.0, None
        model.warming = model.runner.warm_up(lambda key: model.costs.cap(Phase.of(key)))

    # --- the ends of requests

    def _end(self, handle: Handle, outcome: Any) -> None:
        """Ends a request, on any thread, unless it has ended."""
        with self._changed:
            request = self._requests.pop(handle, None)
            if request is None:
                return
            model = request.model
            model.open -= 1
            model.waiting_images -= request.unstarted
            model.waiting_bytes -= request.nbytes if request.unstarted else 0
            model.left.subtract(request.steps)
            request.steps.clear()
            request.unstarted = 0
            if request in model.aside:
                model.aside.remove(request)
            self._changed.notify_all()
        handle._finish(outcome)
        self._inbox.put(lambda: self._drop(request))
        self._tell("finished", handle)

    def _end_all(self, error: Exception) -> None:
        for handle in list(self._requests):
            self._end(handle, error)

    def _drop(self, request: Request) -> None:
        if request.lanes:
            request.model.scheduler.drop(list(request.lanes))
            self._count_lanes(request.model)

    # --- the thread that encodes

    def _encode(self) -> None:
        while True:
            batch = [self._to_encode.get()]
            with suppress(Empty):
                while len(batch) < _ENCODED:
                    batch.append(self._to_encode.get_nowait())
            requests = [request for request in batch if request is not None and not request.over]
            for model in dict.fromkeys(request.model for request in requests):
                self._encode_all(model, [request for request in requests if request.model is model])
            if None in batch:
                return

    def _encode_all(self, model: Model, requests: Sequence[Request]) -> None:
        began = time.monotonic()
        for request in requests:
            request.handle._enter("encoding")
            if not request.retries:
                self._stage(request.handle, "queue", request.arrived, began)
        try:
            found = model.runner.encode([request.asked for request in requests])
        except Exception as error:
            found = [error] * len(requests)
        ended = time.monotonic()
        for request, encoded in zip(requests, found, strict=True):
            if isinstance(encoded, Exception):
                self._failed_request(request, encoded)
                continue
            try:
                request.programs = model.runner.programs(request.asked, encoded)
            except Exception as error:
                self._failed_request(request, error)
                continue
            request.seeds, request.labels, request.prompts = encoded.seeds, encoded.labels, encoded.prompts
            model.stages.observe("encode", request.asked.parsed.size, encoded.n, (ended - began) / len(requests))
            request.handle._took(queued=began - request.arrived, encode=ended - began)
            self._stage(request.handle, "encode", began, ended)
            request.handle._enter("queued")
            self._inbox.put(partial(self._add, request))

    # --- the thread that has the device

    def _denoise(self) -> None:
        try:
            while not (self._stopping and not self._requests):
                self._read_inbox()
                self._expire()
                model = self._next()
                if model is not None:
                    self._tick(model)
                elif self._ran:
                    self._account(self._ran.popleft())
                for each in [*self._models.values(), *self._leaving]:
                    if each.warming is not None and not each.scheduler.groups():
                        self._warm(each)
                    if each.held is not None and each.open == len(each.aside):
                        self._run_held(each)
                for each in [each for each in self._leaving if not each.open]:
                    self._leaving.remove(each)
                    each.leave()
        finally:
            for each in (*self._models.values(), *self._leaving):
                with suppress(Exception):
                    each.leave()

    def _read_inbox(self) -> None:
        """Does what other threads have sent, and waits for it where there is nothing else to do."""
        wait = not self._ran and not self._busy()
        while True:
            try:
                work = self._inbox.get(timeout=self._until_timeout()) if wait else self._inbox.get_nowait()
            except Empty:
                return
            wait = False
            work()

    def _busy(self) -> bool:
        models = (*self._models.values(), *self._leaving)
        return any(model.warming is not None or not model.scheduler.idle for model in models) or (
            self._stopping and not self._requests
        )

    def _until_timeout(self) -> float:
        return min(_LOOK, max(0.0, self._timeouts[0][0] - time.monotonic())) if self._timeouts else _LOOK

    def _expire(self) -> None:
        now = time.monotonic()
        while self._timeouts and self._timeouts[0][0] <= now:
            handle = heapq.heappop(self._timeouts)[2]
            if not handle.done():
                took = now - handle.submitted
                self._end(
                    handle,
                    OutOfTime(f"request {handle.id} has not ended after {took:.3g} s", hint="give a longer timeout="),
                )

    def _add(self, request: Request) -> None:
        if request.over:
            return
        images = [(image, program.keys, program.start) for image, program in enumerate(request.programs)]
        request.model.scheduler.add(request, images, time.monotonic())

    def _next(self) -> Model | None:
        """The bundle that is to run next: the one that has had the least of its share."""
        ready = [
            model
            for model in (*self._models.values(), *self._leaving)
            if model.scheduler.groups() or (model.warming is None and not model.scheduler.idle)
        ]
        if not ready:
            return None
        chosen = min(ready, key=lambda model: model.clock)
        for model in self._models.values():  # one that was idle does not save up for later
            if model.scheduler.idle:
                model.clock = max(model.clock, chosen.clock)
        return chosen

    def _tick(self, model: Model) -> None:
        began = time.perf_counter()
        now = time.monotonic()
        if model.warming is None:
            for lane in model.scheduler.admit(now):
                self._start(model, lane, now)
        tick = model.scheduler.choose(now)
        if tick is None:
            return
        key: Any = tick.key
        chosen = time.perf_counter()
        try:
            watch = model.runner.step(key, [lane.slot for lane in tick.lanes])
        except Exception as error:
            self._step_failed(model, tick, error)
            return
        stepped = time.perf_counter()
        ended = time.monotonic()
        segments = {(_request(lane), _request(lane).segments[lane.step]) for lane in tick.lanes}
        for request, segment in segments:
            request.spans[segment] = (request.spans.get(segment, (now, 0.0))[0], ended)
        self._after(model, tick)
        host = chosen - began + time.perf_counter() - stepped
        self._ran.append(_Ran(model, tick, watch, host, segments))
        while len(self._ran) > (0 if model.runner.synchronous else _AHEAD):
            self._account(self._ran.popleft())

    def _start(self, model: Model, lane: Lane, now: float) -> None:
        request = _request(lane)
        try:
            model.runner.start(lane.slot, request.programs[lane.image])
        except Exception as error:
            self._failed_request(request, error)
            return
        first = request.unstarted == request.handle.n
        with self._lock:
            if request.unstarted:
                request.unstarted -= 1
                model.waiting_images -= 1
                model.waiting_bytes -= 0 if request.unstarted else request.nbytes
        if first:
            request.handle._enter("denoising")
            request.started_at = now
            self._tell("started", request.handle)

    def _after(self, model: Model, tick: Tick) -> None:
        """The lanes of a batch that was enqueued move on."""
        key: Any = tick.key
        slots = [lane.slot for lane in tick.lanes]
        faulty = dict(model.runner.faulty(slots))
        ended: list[tuple[Lane, int]] = []
        for lane, slot in zip(tick.lanes, slots, strict=True):
            request = _request(lane)
            step = lane.step
            if slot in faulty:
                continue
            request.handle._tell(LaneEvent(lane.image, step + 1, len(lane.keys), key.member))
            if step in request.previews and lane.left > 1:
                read = model.runner.estimate(request.asked, slot, step)
                self._to_decode.put(_Peek(request, lane.image, step, read))
            if lane.left == 1:
                ended.append((lane, slot))
        if ended:
            answers = model.runner.answers([(slot, lane.keys[-1].size) for lane, slot in ended])  # type: ignore[attr-defined]
            for (lane, _), answer in zip(ended, answers, strict=True):
                self._to_decode.put(_Drawn(_request(lane), lane.image, answer))
        model.scheduler.ran(tick, time.monotonic())
        phase = Phase.of(key)
        with self._lock:
            for lane in tick.lanes:
                request = _request(lane)
                if request.steps:
                    request.steps[phase] -= 1
                    model.left[phase] -= 1
        for lane, slot in zip(tick.lanes, slots, strict=True):
            if slot in faulty:
                self._lane_failed(model, lane, faulty[slot])
        self._count_lanes(model)

    def _lane_failed(self, model: Model, lane: Lane, step: int) -> None:
        """``step``: after which its latents were not finite."""
        request = _request(lane)
        with self._lock:
            for key in lane.keys[lane.step :] if request.steps else ():
                phase = Phase.of(key)  # type: ignore[arg-type]
                request.steps[phase] -= 1
                model.left[phase] -= 1
        model.scheduler.drop([lane])
        self._to_decode.put(_Fault(request, lane.image, step))

    def _account(self, ran: _Ran) -> None:
        """Waits for a batch, and takes its time down."""
        model, lanes, key = ran.model, ran.tick.lanes, ran.tick.key
        try:
            seconds = ran.watch.milliseconds()[0] / 1e3
        except Exception as error:
            self._step_failed(model, ran.tick, error)
            return
        model.clock += seconds / model.weight
        phase = Phase.of(key)  # type: ignore[arg-type]
        model.costs.observe(phase, len(lanes), seconds)
        for request, segment in ran.segments:
            request.seconds[segment] += seconds
        bucket = model.runner.bucket(phase, len(lanes))
        self._tell(
            "ticked",
            TickInfo(model.name, phase.member, phase.guided, phase.size, len(lanes), bucket, seconds, ran.host),
        )

    def _count_lanes(self, model: Model) -> None:
        found: dict[str, int] = {}
        for key, lanes in model.scheduler.groups().items():
            member: str = key.member  # type: ignore[attr-defined]
            found[member] = found.get(member, 0) + len(lanes)
        model.lanes_by_member = found

    def _warm(self, model: Model) -> None:
        """One piece of it, so that other bundles' steps go on in between."""
        assert model.warming is not None, "asked before"
        try:
            timed, share = next(model.warming)
        except StopIteration:
            model.warming = None
            with self._changed:
                self._changed.notify_all()
            return
        except Exception as error:
            model.warming = None
            model.warm_error = error
            with self._changed:
                self._changed.notify_all()
            return
        model.warmed = share
        if timed is not None:
            model.costs.observe(Phase.of(timed.key), timed.lanes, timed.seconds)

    def _run_held(self, model: Model) -> None:
        with self._lock:
            held, model.held = model.held, None
        if held is not None:
            held()
            with self._lock:
                self._release(model)

    # --- what goes wrong

    def _failed_request(self, request: Request, error: Exception) -> None:
        if isinstance(error, DeviceLost):
            self._inbox.put(lambda: self._device_lost(request.model, error))
            return
        self._end(request.handle, error)

    def _step_failed(self, model: Model, tick: Tick, error: Exception) -> None:
        """The requests that had lanes in the batch fail, the others go on."""
        if isinstance(error, DeviceLost):
            self._device_lost(model, error)
            return
        _log.warning("a step of %d lanes failed: %s", len(tick.lanes), first_line(error), exc_info=error)
        for request in dict.fromkeys(_request(lane) for lane in tick.lanes):
            self._end(request.handle, error)

    def _device_lost(self, model: Model, error: DeviceLost) -> None:
        """Loads the bundle anew, once for each loss, and begins again with what was not answered; a request that this
        happens to twice fails."""
        if model.runner.closed:
            return  # told by several threads
        self._ran.clear()
        _log.error("the device is lost: %s", first_line(error))
        requests = [request for request in self._requests.values() if request.model is model]
        with suppress(Exception):
            model.leave()
        if not model.owned:
            self._give_up(
                FailedWork(
                    f"the device is lost, and the runtime was not loaded by the engine: {first_line(error)}",
                    hint="start the process again; give the engine the bundle's path, and it loads it again itself",
                )
            )
            return
        try:
            again = self._open(model.name, model.source)
            again.enter()
        except Exception as second:
            self._give_up(
                FailedWork(
                    f"the device is lost and can't be used again by this process: {first_line(second)}",
                    hint="start the process again",
                )
            )
            return
        with self._lock:
            if model in self._leaving:
                self._leaving[self._leaving.index(model)] = again
            else:
                self._models = {**self._models, model.name: again}
            again.clock = model.clock
        for request in requests:
            if request.retries:
                self._end(request.handle, error)
                continue
            with self._lock:
                if request.handle not in self._requests:
                    continue
                renewed = self._requests[request.handle] = request.again(again)
                again.open += 1
                again.waiting_images += renewed.unstarted
                again.waiting_bytes += renewed.nbytes
                again.left.update(renewed.steps)
            self._to_encode.put(renewed)

    def _give_up(self, error: Exception) -> None:
        _log.error("%s", error)
        with self._changed:
            self._failed = error
            self._draining = True
            self._changed.notify_all()
        self._end_all(error)

    # --- the thread that decodes

    def _decode(self) -> None:
        while True:
            batch = [self._to_decode.get()]
            with suppress(Empty):
                while len(batch) < 4 * _DECODED:
                    batch.append(self._to_decode.get_nowait())
            for fault in batch:
                if isinstance(fault, _Fault) and not fault.request.over:
                    self._image_failed(fault.request, fault.image, fault.step)
            drawn = [one for one in batch if isinstance(one, _Drawn)]
            for start in range(0, len(drawn), _DECODED):
                self._decode_drawn(drawn[start : start + _DECODED])
            self._decode_peeks([one for one in batch if isinstance(one, _Peek)])
            if None in batch:
                return

    def _decode_drawn(self, drawn: Sequence[_Drawn]) -> None:
        groups: dict[tuple[Model, tuple[int, int]], list[tuple[_Drawn, NDArray[np.float32]]]] = {}
        for one in drawn:
            request = one.request
            if request.over:
                continue
            try:
                latents, fault = request.model.runner.fetch(one.answer)
            except Exception as error:
                self._failed_request(request, error)
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
                    self._failed_request(request, error)
                continue
            ended = time.monotonic()
            model.stages.observe("decode", size, len(group), ended - began)
            for (one, latents), picture, fine in zip(group, pictures, good, strict=True):
                if not fine:
                    self._image_failed(one.request, one.image, -1)
                else:
                    self._image_done(one.request, one.image, latents[0], picture)

    def _decode_peeks(self, peeks: Sequence[_Peek]) -> None:
        for peek in peeks:
            request = peek.request
            if request.over:
                continue
            try:
                pictures, _ = request.model.runner.decode(peek.read())
            except Exception as error:
                _log.warning("no preview: %s", first_line(error))
                continue
            names = request.asked.plan.schedule.names
            request.handle._tell(
                LaneEvent(peek.image, peek.step + 1, len(names), names[peek.step], preview=pictures[0])
            )

    def _image_failed(self, request: Request, image: int, fault: int) -> None:
        """``fault``: the step (from 0) after which it was not finite, -1 for the decoder."""
        names = request.asked.plan.schedule.names
        error = request.fail(image, fault + 1, names[fault] if fault >= 0 else "vae_decoder")
        if error is not None:
            self._end(request.handle, error)
        else:
            self._image_ended(request)

    def _image_done(
        self, request: Request, image: int, latents: NDArray[np.float32], picture: NDArray[np.uint8] | None
    ) -> None:
        request.add(image, latents, picture)
        self._image_ended(request)

    def _image_ended(self, request: Request) -> None:
        request.left -= 1
        request.handle._enter("decoding" if request.left == 0 else "denoising")
        if request.left:
            return
        now = time.monotonic()
        started = request.started_at
        request.handle._took(denoise=now - started)
        self._stage(request.handle, "denoise", started, now)
        for segment, (began, ended) in sorted(request.spans.items()):
            self._tell("phase", request.handle, request.asked.plan.schedule.segments[segment].name, began, ended)
        self._end(request.handle, request.result())

    # --- small things

    def _call(self, work: Callable[[], T]) -> T:
        """``work`` on the device's thread. Raises what it raises."""
        call = _Call(work)
        self._inbox.put(call.run)
        while not call.done.wait(_LOOK):
            if self._failed is not None and not self._threads[1].is_alive():
                raise self._failed
        if call.error is not None:
            raise call.error
        return call.found  # type: ignore[return-value]

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that ends by a fault of ours takes no request with it in silence."""
        try:
            work()
        except Exception as error:
            self._give_up(FailedWork(f"the engine has stopped: {first_line(error)}", hint="start the process again"))
            _log.exception("the engine has stopped")

    def _check_open(self) -> None:
        if self._failed is not None:
            raise Closed(str(self._failed), hint="start the process again")
        if self._draining:
            raise Closed("the engine takes no requests any more", hint="ask another, or start it again")

    def _stage(
        self, handle: Handle, name: Literal["queue", "encode", "denoise", "decode"], began: float, ended: float
    ) -> None:
        self._tell("stage", handle, name, began, ended)

    def _tell(self, what: str, *values: object) -> None:
        try:
            getattr(self.observer, what)(*values)
        except Exception:
            _log.exception("an observer failed in %s", what)


def _request(lane: Lane) -> Request:
    assert isinstance(lane.job, Request), "the engine's own"
    return lane.job


_OPEN: Final[WeakSet[Engine]] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Before runtimes are closed and daemon threads stopped."""
    for engine in list(_OPEN):
        with suppress(Exception):
            engine.close(cancel=True, timeout=_EXIT_SECONDS)
