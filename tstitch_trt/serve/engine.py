"""The batching engine: one thread owns the device and runs the steps of many requests in shared batches.

Three threads: requests are encoded on one, denoised on the next and decoded on the last, so that none of the stages
waits for another request's. The one in the middle has the lanes to itself; the others send it what is to be done.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, Unpack
from weakref import WeakSet

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.checks import (
    check_callable,
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
    FailedWork,
    Overloaded,
    Unavailable,
    first_line,
    unknown_name,
)
from tstitch_trt.request.limits import MOST_IMAGES
from tstitch_trt.request.options import SampleKeywords, SampleOptions
from tstitch_trt.runtime.chooser import check_budget
from tstitch_trt.runtime.job import Job
from tstitch_trt.runtime.load import load as load_runtime
from tstitch_trt.runtime.lora import LoraFiles, local_loras
from tstitch_trt.runtime.runtime import MOST_LANES, Runtime
from tstitch_trt.runtime.work_queue import check_timeout
from tstitch_trt.serve.admission import Cheaper, Offer, Refused
from tstitch_trt.serve.book import Book
from tstitch_trt.serve.costs import CostPoint
from tstitch_trt.serve.denoising import Denoising
from tstitch_trt.serve.encoding import Encoding
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.model import Model, Phase, Request, preview_steps, waiting_bytes
from tstitch_trt.serve.observer import EngineState, ModelState, Observer
from tstitch_trt.serve.policy import DeadlineFirst
from tstitch_trt.serve.scheduler import Policy

if TYPE_CHECKING:
    from tstitch_engines.progress import Progress

__all__ = ["Engine", "Source"]

_log = logging.getLogger(__name__)

Source = Runtime | Bundle | str | Path
MOST_PREVIEWS: Final = 50
_LOOK: Final = 0.5  # seconds after which a thread that waits looks itself
_EXIT_SECONDS: Final = 5.0


class Engine:
    """Draws for many callers at once, over one bundle or several by name.

    ``source``: a runtime, which the engine has to itself until it is closed, or what ``tstitch_trt.load`` takes, with
    the keywords ``load``; or a mapping of names to those. ``max_lanes``: images of a bundle that are drawn at once, by
    default twice its largest batch. ``policy``: makes what chooses the batches of one bundle (``serve.policy``).
    ``weights``: shares of the device among bundles, 1 by default. ``max_queue`` and ``max_queue_bytes``: images of each
    bundle that wait for a lane, and what their requests hold on the host; more are refused with ``Overloaded``.
    ``cheaper``: how far requests with a latency budget may be made cheaper under load. ``calibration``: gives
    what steps of a bundle cost, from which their batches are capped; without it the batch that its engines were tuned
    for is the cap, and costs are learned from the steps that run. ``observer``: is told of everything.

    Every image is the one that ``Runtime.sample`` draws alone: bit for bit where its batches were padded to the same
    sizes, else within the engines' rounding (1e-4 relative in fp32). Raises what ``load`` raises. Not run on a GPU.
    """

    @checked(
        source=taken_as_is,
        max_lanes=optional(partial(check_whole, low=1, high=MOST_LANES)),
        policy=taken_as_is,
        weights=taken_as_is,
        max_queue=partial(check_whole, low=1, high=MOST_IMAGES),
        max_queue_bytes=taken_as_is,
        cheaper=taken_as_is,
        calibration=optional(check_callable),
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
        cheaper: Cheaper | None = None,
        calibration: Callable[[Runtime], Iterable[CostPoint]] | None = None,
        load: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.max_queue = max_queue
        self.max_queue_bytes = parse_size(max_queue_bytes, "max_queue_bytes", "--max-queue-bytes 2GiB")
        self._cheaper = cheaper
        self._calibration = calibration or (lambda runtime: ())
        self._max_lanes = max_lanes
        self._policy = policy
        self._load = dict(load or {})
        self._weights = {name: check_number(w, f"weight of {name}", 1e-3, 1e3) for name, w in (weights or {}).items()}
        sources: Mapping[Any, Source] = source if isinstance(source, Mapping) else {None: source}
        if not sources:
            raise BadInput("no bundle was given", hint="give at least one: Engine('fashion.bundle')")
        if isinstance(source, Mapping):
            for name in self._weights:
                if name not in source:
                    raise unknown_name("model", name, source)
        self._process = os.getpid()
        self._book = Book(observer or Observer())
        self._denoising = Denoising(self._book, self._reopen)
        encoding = Encoding(self._book, self._denoising.add, self._denoising.failed)
        works = {"encode": encoding.run, "denoise": self._denoising.run, "decode": self._denoising.decoding.run}
        models: list[Model] = []
        try:
            for name, each in sources.items():
                models.append(self._open(name, each))
        except BaseException:
            for model in models:
                model.leave()
            raise
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"tstitch-{name}", daemon=True)
            for name, work in works.items()
        ]
        _OPEN.add(self)
        for thread in self._threads:
            thread.start()
        try:
            for model in models:
                self._denoising.call(partial(self._adopt, model))
        except BaseException:
            self.close(cancel=True)
            for model in models:
                if model not in self._book.models.values():
                    model.leave()
            raise

    # --- what it is

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._book.models)

    def runtime(self, model: str | None = None) -> Runtime:
        """For its facts (manifest, limits, plan...): every call that needs its engines waits until this is closed."""
        return self._model(model).runtime

    def state(self) -> EngineState:
        """A snapshot."""
        book = self._book
        with book.lock:
            models = {name: _state(model, book.of(model)) for name, model in book.models.items()}
        failed = None if book.failed is None else str(book.failed)
        ready = failed is None and not book.draining and all(model.warm for model in models.values())
        return EngineState(ready=ready, draining=book.draining, failed=failed, models=models)

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
        request is accepted only if it is expected to end within; it then goes first where it must. ``priority``: higher
        goes first, -100 to 100. ``partial``: as of ``sample``. ``timeout``: seconds after which the request fails with
        ``OutOfTime``.

        Raises ``BadInput`` and its kinds for a request that can't be right, ``Overloaded`` with the seconds after
        which to try again, and ``Closed`` while the engine drains and afterwards.
        """
        if options is not None and keywords:
            raise BadInput(
                f"both options and {', '.join(keywords)} were given", hint="give SampleOptions, or keywords alone"
            )
        asked = SampleOptions.from_keywords(keywords) if options is None else options
        if not isinstance(asked, SampleOptions):
            raise BadInput(f"options is {shown(asked)}; needed is a SampleOptions", hint="or give keywords: labels=[1]")
        self._check_process()
        while True:
            chosen = self._model(model)
            try:
                return self._submit(
                    chosen, asked, decode=decode, previews=previews, latency_budget_ms=latency_budget_ms,
                    priority=priority, allow_partial=partial, timeout=timeout, request_id=request_id,
                )  # fmt: skip
            except Exception:
                if self._book.models.get(chosen.name) is chosen:
                    raise  # else another took over meanwhile, and is asked

    def _submit(
        self, chosen: Model, asked: SampleOptions, *, decode: bool | None, previews: int,
        latency_budget_ms: float | None, priority: int, allow_partial: bool, timeout: float | None,
        request_id: str | None,
    ) -> Handle:  # fmt: skip
        now = time.monotonic()
        job = chosen.runner.job(asked, decode=decode, events=previews > 0, partial=allow_partial)
        offers = [(job, self._offer(chosen, job), "")]
        budget = None if latency_budget_ms is None else latency_budget_ms / 1e3

        def accepted() -> Handle | Refused:
            """Asked and accepted under one lock, so that the queue keeps its bound."""
            with self._book.lock:
                if self._book.models.get(chosen.name) is not chosen:
                    raise Busy("the bundle was replaced meanwhile", hint="submit the request again")
                answer = self._book.ask(chosen, [offer for _, offer, _ in offers], now, budget)
                if isinstance(answer, Refused):
                    return answer
                job, offer, adapted = offers[answer.offer]
                deadline = None if budget is None else now + budget
                handle = Handle(
                    request_id or secrets.token_hex(8), chosen.name, job.plan, asked, offer.images,
                    priority=priority, deadline=deadline, adapted=adapted or None, estimate=answer.seconds,
                    cancel=self._book.end,
                )  # fmt: skip
                self._book.accept(
                    Request(
                        now, priority, deadline, handle=handle, model=chosen, asked=job,
                        phases=offer.phases, nbytes=offer.bytes,
                        previews=preview_steps(offer.phases[0][1], len(job.plan.schedule), previews),
                    )
                )  # fmt: skip
                return handle

        try:
            found = accepted()
        except Closed:
            self._book.rejected("closed", chosen)
            raise
        if isinstance(found, Refused) and found.why == "budget" and self._cheaper is not None:
            offers += self._cheaper_offers(chosen, asked, job, self._cheaper)
            found = accepted()
        if isinstance(found, Refused):
            self._book.rejected("queue" if found.why == "images" else found.why, chosen)
            raise self._overloaded(found, budget)
        accepted_one = found
        self._book.tell(lambda observer: observer.submitted(accepted_one))
        if timeout is not None:
            self._denoising.expire_at(now + timeout, found)
        return found

    def _check_process(self) -> None:
        """Raises ``FailedWork`` in a fork."""
        if self._process != os.getpid():
            raise FailedWork(
                f"this engine was made by process {self._process}, of which this one ({os.getpid()}) is a fork: its "
                "threads are not here",
                hint="make the engine after the fork, once in each process",
            )

    def _offer(self, model: Model, job: Job) -> Offer:
        """Raises ``BadInput`` for what no emptier queue would have room for, ``OutOfProfile``."""
        offer = model.offer(job)
        if offer.images > self.max_queue:
            raise BadInput(
                f"{offer.images:,} images in one request; allowed are {self.max_queue:,} (max_queue)",
                hint="ask for the images in several requests",
            )
        if offer.bytes > self.max_queue_bytes:
            raise BadInput(
                f"the request holds {offer.bytes:,} bytes; allowed are {self.max_queue_bytes:,} (max_queue_bytes)",
                hint="ask for fewer or smaller images at once",
            )
        for phase, _, _ in offer.phases:
            model.runner.bucket(Phase.of(phase), 1)
        return offer

    def _cheaper_offers(
        self, model: Model, asked: SampleOptions, job: Job, limits: Cheaper
    ) -> list[tuple[Job, Offer, str]]:
        """The request with more of its steps on the first member, and then with fewer steps, each with what was
        changed; none where its schedule was said."""
        plan, own = asked.plan, model.offer(job)
        if plan.schedule is not None or plan.timesteps is not None or len(model.runtime.members) < 2:
            return []
        before, steps = own.fraction or 0.0, plan.asked_steps(model.runtime.manifest)
        last = max(before, limits.max_fraction)
        wanted = [(share / 10, steps) for share in range(1, 11) if before < share / 10 < last]
        wanted += [(last, steps)] if last > before else []
        fewer = [round(steps * share / 10) for share in range(9, 0, -1)]
        wanted += [(last, count) for count in fewer if limits.min_steps <= count < steps]
        found = []
        for share, count in wanted:
            cheaper = replace(asked, plan=replace(plan, fraction=share, steps=count))
            with suppress(BadInput):  # what the request or the bundle fixes besides does not go with it
                made = model.runner.job(cheaper, decode=job.decode, events=job.events, partial=job.partial)
                told = [f"fraction {before:.3g} -> {share:.3g}"] if share != before else []
                told += [f"steps {steps} -> {count}"] if count != steps else []
                found.append((made, model.offer(made), ", ".join(told)))
        return found

    def _overloaded(self, refused: Refused, budget: float | None) -> Overloaded:
        later = refused.retry_after if math.isfinite(refused.retry_after) else None
        hint = "it is too short even without load" if later is None else f"try again in about {later:.2g} s"
        if refused.why == "budget":
            what = f"the images would take {refused.seconds:.3g} s; the latency budget is {budget:.3g} s"
        elif refused.why == "images":
            what = f"the queue is full: {self.max_queue:,} images may wait (max_queue)"
        else:
            what = f"the queue is full: waiting requests may hold {self.max_queue_bytes:,} bytes (max_queue_bytes)"
        error = Overloaded(what, hint=hint)
        error.retry_after = later
        return error

    # --- the whole

    def warm_up(self, progress: Progress | None = None) -> None:
        """Runs every kind of step once at every size of batch that it may have, so that no request waits for that.

        Of the bundles' own picture sizes. Waits. Requests are taken meanwhile and drawn afterwards.
        """
        self._check_process()
        models = list(self._book.models.values())
        for model in models:
            self._denoising.call(partial(self._begin_warming, model))
        self._await_warm(models, progress or (lambda phase, share: None))

    def _await_warm(self, models: Sequence[Model], tell: Progress) -> None:
        while True:
            with self._book.changed:
                over = all(model.warming is None for model in models)
                if not over:
                    self._book.changed.wait(0.1)
            for error in (self._book.failed, *(model.warm_error for model in models)):
                if error is not None:
                    raise error
            tell("warming up", 1.0 if over else sum(model.warmed for model in models) / len(models))
            if over:
                return

    def replace(self, model: str | None, source: Source) -> None:
        """Loads ``source`` beside the bundle that is served as ``model``, and lets it take over between requests.

        Those that were accepted before end on the old one, which is then let go of. Waits until the new one has taken
        over; where this raises, the old one goes on. Raises ``Closed`` once the engine drains.
        """
        self._check_process()
        self._book.check_open()
        old = self._model(model)
        new = self._open(old.name, source)
        try:
            self._denoising.call(partial(self._enter_beside, new))
            self._await_warm([new], lambda phase, share: None)
            self._denoising.call(partial(self._take_over, new))
        except BaseException:
            with suppress(Exception):
                self._denoising.call(partial(self._abandon, new))
            raise

    def swap_lora(self, name: str, files: LoraFiles, *, model: str | None = None, timeout: float | None = None) -> None:
        """``Runtime.swap_lora`` for all requests from now on: those that were accepted before end first.

        Raises as that, and ``Busy`` when they have not ended after ``timeout`` seconds; nothing is swapped then.
        """
        chosen, local = self._model(model), local_loras(files)
        self._once_idle(chosen, lambda: chosen.runtime.swap_lora(name, local), timeout)

    def restore_lora(self, name: str | None = None, *, model: str | None = None, timeout: float | None = None) -> None:
        """Takes out what ``swap_lora`` put in, likewise."""
        chosen = self._model(model)
        self._once_idle(chosen, lambda: chosen.runtime.restore(name), timeout)

    def _once_idle(self, model: Model, work: Callable[[], None], timeout: float | None) -> None:
        wait = check_timeout(timeout)
        self._check_process()
        self._book.check_open()
        if model.holding:
            raise Busy("another change of adapters waits for its turn", hint="try again when it is done")
        if not self._denoising.once_idle(model, work, wait):
            raise Busy(
                f"requests that were accepted before have not ended after {wait:g} s", hint="give a longer timeout="
            )

    def drain(self) -> None:
        """Refuses requests from now on. Those that were accepted are drawn."""
        with self._book.lock:
            self._book.draining = True

    @checked(cancel=check_switch, timeout=check_timeout)
    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Refuses requests, waits for those that were accepted, or with ``cancel`` ends them; gives the runtimes back,
        and closes those that the engine loaded itself.

        Raises ``Busy`` after ``timeout`` seconds; the engine then still draws what it has, and another call closes it.
        """
        if self._process != os.getpid():  # nothing here is this process's to wait for or to free
            return
        book = self._book
        self.drain()
        if cancel:
            book.end_all(Closed("the engine was closed", hint="ask again, of an engine that is open"))
        until = None if timeout is None else time.monotonic() + timeout
        with book.changed:
            while book.requests:
                left = _LOOK if until is None else min(_LOOK, until - time.monotonic())
                if left <= 0:
                    raise Busy(
                        f"{len(book.requests)} requests have not ended after {timeout:g} s",
                        hint="close(cancel=True) cancels them",
                    )
                book.changed.wait(left)
        book.to_encode.put(None)
        self._denoising.decoding.queue.put(None)
        self._denoising.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if until is None else max(0.1, until - time.monotonic()))
        _OPEN.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    # --- bundles

    def _model(self, name: str | None) -> Model:
        models = self._book.models
        if name is None:
            if len(models) == 1:
                return next(iter(models.values()))
            raise BadInput(f"several models are served: {', '.join(models)}", hint="say which: model=")
        if name not in models:
            raise unknown_name("model", name, models)
        return models[name]

    def _open(self, name: str | None, source: Source) -> Model:
        """Loads it, where it is no runtime."""
        owned = not isinstance(source, Runtime)
        runtime = source if isinstance(source, Runtime) else load_runtime(source, **self._load)
        known = runtime.manifest.name if name is None else check_text(name, "model", example="fashion", most=1000)
        return Model(
            known,
            runtime,
            source=source,
            owned=owned,
            weight=self._weights.get(known, 1.0),
            max_lanes=self._max_lanes,
            policy=self._policy,
            room=(self.max_queue, self.max_queue_bytes),
            cheaper=self._cheaper,
            calibration=self._calibration(runtime),
        )

    def _reopen(self, model: Model) -> Model:
        """After its device was lost. Raises ``Unavailable`` for a runtime that others loaded."""
        if not model.owned:
            raise Unavailable(
                "the runtime was not loaded by the engine", hint="give the engine the bundle's path in its place"
            )
        again = self._open(model.name, model.source)
        try:
            again.enter()
        except BaseException:
            again.leave()
            raise
        return again

    def _adopt(self, model: Model) -> None:
        model.enter()
        self._book.models = {**self._book.models, model.name: model}

    def _enter_beside(self, model: Model) -> None:
        model.enter()
        self._book.joining.append(model)
        self._begin_warming(model)

    def _take_over(self, new: Model) -> None:
        with self._book.lock:
            self._book.joining.remove(new)
            old = self._book.models[new.name]  # now: a lost device has the one before loaded again
            new.clock = old.clock
            self._book.models = {**self._book.models, new.name: new}
            self._book.leaving.append(old)

    def _abandon(self, model: Model) -> None:
        """Lets go of what was loaded to replace another, or of what stands in its place after its device was lost."""
        joining = [each for each in self._book.joining if each.name == model.name] or [model]
        self._book.joining = [each for each in self._book.joining if each not in joining]
        for each in joining:
            each.leave()

    def _begin_warming(self, model: Model) -> None:
        model.warmed, model.warm_error = 0.0, None
        model.warming = model.runner.warm_up(lambda key: min(model.max_lanes, model.costs.cap(Phase.of(key))))

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that ends by a fault of ours takes no request with it in silence."""
        try:
            work()
        except Exception as error:
            _log.exception("the engine has stopped")
            stopped = FailedWork(f"the engine has stopped: {first_line(error)}", hint="start the process again")
            self._book.give_up(stopped)


def _state(model: Model, requests: Sequence[Request]) -> ModelState:
    """``requests``: those of this bundle that are open."""
    lanes: dict[str, int] = {}
    for key, group in model.scheduler.groups().items():
        member = Phase.of(key).member
        lanes[member] = lanes.get(member, 0) + len(group)
    return ModelState(
        lanes=sum(lanes.values()),
        max_lanes=model.max_lanes,
        waiting_images=sum(request.unstarted for request in requests),
        waiting_bytes=waiting_bytes(requests),
        lanes_by_member=lanes,
        open=len(requests),
        backlog_seconds=model.load(requests).seconds,
        warm=model.warming is None,
    )


_OPEN: Final[WeakSet[Engine]] = WeakSet()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_OPEN.clear)


@atexit.register
def _close_all() -> None:
    """Before runtimes are closed and daemon threads stopped."""
    for engine in list(_OPEN):
        with suppress(Exception):
            engine.close(cancel=True, timeout=_EXIT_SECONDS)
