"""An engine in another process: requests are sent to whichever of several engines, and again where that one is lost.

``answer`` runs beside an ``Engine``, ``RemoteEngine`` in the process that has the clients. In between is anything that
carries messages: ``tstitch_trt.serve.ray_app`` has Ray Serve.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import (
    Closed,
    DeviceLost,
    FailedWork,
    OutOfTime,
    Overloaded,
    TStitchError,
    first_line,
    unknown_name,
)
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.limits import Limits
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.runtime.result import Result
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle, LaneEvent, Times
from tstitch_trt.serve.observer import EngineState

__all__ = ["Accepted", "Asked", "Done", "Facts", "Message", "Refused", "RemoteEngine", "answer", "facts_of"]

_log = logging.getLogger(__name__)

_ENGINES: Final = 2  # that a request is given to, one after another
_WAIT: Final = 1.0  # seconds between two tries to give a request that was accepted to another engine
_CLOSING: Final = 5.0  # seconds for the engines to hear that requests are cancelled
_LONGEST: Final = 300.0  # seconds of such tries for a request without a time-out


@dataclass(frozen=True)
class Facts:
    """What a server has to know of a bundle: the part of ``Runtime`` that needs no engine."""

    manifest: Manifest
    limits: Limits


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """The arguments of ``Engine.submit``."""

    options: SampleOptions
    model: str
    previews: int
    latency_budget_ms: float | None
    priority: int
    timeout: float | None
    request_id: str


@dataclass(frozen=True)
class Accepted:
    """The first message about a request. The fields are those of ``Handle``."""

    plan: Plan
    n: int
    estimate: float
    adapted: str | None


@dataclass(frozen=True)
class Done:
    """The last one: the ``result`` without latents."""

    result: Result
    times: Times


@dataclass(frozen=True)
class Refused:
    """The last one, or the only one: what ``submit`` or the request raised."""

    error: TStitchError


Message = Accepted | LaneEvent | Done | Refused


def facts_of(engine: Engine) -> dict[str, Facts]:
    return {name: Facts(engine.runtime(name).manifest, engine.runtime(name).limits) for name in engine.models}


async def answer(engine: Engine, asked: Asked) -> AsyncIterator[Message]:
    """Has a request drawn. It is cancelled where this iterator is closed, or the task that runs it cancelled."""
    submit = partial(
        engine.submit, asked.options, model=asked.model, previews=asked.previews, priority=asked.priority,
        latency_budget_ms=asked.latency_budget_ms, timeout=asked.timeout, request_id=asked.request_id,
    )  # fmt: skip
    submitting = asyncio.ensure_future(asyncio.to_thread(submit))
    try:
        handle = await asyncio.shield(submitting)
    except asyncio.CancelledError:
        submitting.add_done_callback(lambda done: done.exception() or done.result().cancel())
        raise
    except TStitchError as error:
        yield Refused(error)
        return
    try:
        yield Accepted(handle.plan, handle.n, handle.estimate, handle.adapted)
        if asked.previews:
            async for event in handle:
                if event.preview is not None:
                    yield event
        try:
            result = await handle
        except TStitchError as error:
            yield Refused(error)
        else:
            yield Done(replace(result, _latents=None, _device_latents=None), handle.times)
    finally:
        handle.cancel("whoever asked has gone")


class RemoteEngine:
    """What the HTTP server needs of an ``Engine``, of engines elsewhere.

    ``ask`` sends a request to one of them and gives its messages. ``lost`` says of an exception of it that the engine
    is lost: the request is then given to another one, once, as it was accepted, so that its pictures are the same
    (``options`` have a seed). What was told of it is not told again. ``facts``: of every bundle, the first is default.
    """

    def __init__(
        self, ask: Callable[[Asked], AsyncGenerator[Message, None]], facts: Mapping[str, Facts],
        *, lost: Callable[[Exception], bool],
    ) -> None:  # fmt: skip
        self._ask = ask
        self._facts = dict(facts)
        self._lost = lost
        self._tasks: dict[Handle, asyncio.Task[None]] = {}
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tstitch-remote", daemon=True)
        self._thread.start()

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._facts)

    def runtime(self, model: str | None = None) -> Facts:
        name = self.models[0] if model is None else model
        if name not in self._facts:
            raise unknown_name("model", name, self._facts)
        return self._facts[name]

    def state(self) -> EngineState:
        return EngineState(ready=not self._closed, draining=self._closed, failed=None, models={})

    def submit(
        self,
        options: SampleOptions,
        /,
        *,
        model: str | None = None,
        previews: int = 0,
        latency_budget_ms: float | None = None,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Handle:
        """As ``Engine.submit``, but waits until an engine has accepted the request: not for an event loop."""
        if self._closed:
            raise Closed("the server is ending", hint="ask another, or start it again")
        asked = Asked(
            options=options, model=self.models[0] if model is None else model, previews=previews, priority=priority,
            latency_budget_ms=latency_budget_ms, timeout=timeout, request_id=request_id or secrets.token_hex(8),
        )  # fmt: skip
        return asyncio.run_coroutine_threadsafe(self._begin(asked), self._loop).result()

    def close(self) -> None:
        """Cancels what goes on."""
        self._closed = True
        for handle in list(self._tasks):
            handle.cancel("the server is ending")
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(_CLOSING)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin(self, asked: Asked) -> Handle:
        first: asyncio.Future[Handle] = self._loop.create_future()
        request = _Request(self, asked, first)
        task = self._loop.create_task(request.follow())
        try:
            return await first
        finally:
            if first.done() and not first.cancelled() and first.exception() is None and not task.done():
                self._tasks[first.result()] = task
                task.add_done_callback(lambda _: self._tasks.pop(first.result(), None))

    def _end(self, handle: Handle, error: Exception) -> None:
        """Of ``Handle.cancel``."""
        handle._finish(error)
        task = self._tasks.get(handle)
        if task is not None:
            self._loop.call_soon_threadsafe(task.cancel)


class _Request:
    """One request on its way: ``first`` gets its handle, or the error that it was refused with."""

    def __init__(self, engine: RemoteEngine, asked: Asked, first: asyncio.Future[Handle]) -> None:
        self._engine = engine
        self._asked = asked
        self._first = first
        self._handle: Handle | None = None
        self._told: set[tuple[int, int]] = set()  # image and step of events
        self._began = time.monotonic()
        self._end = self._began + (_LONGEST if asked.timeout is None else asked.timeout)

    async def follow(self) -> None:
        try:
            await self._draw()
        except asyncio.CancelledError:
            self._fail(Closed("the request was cancelled", hint="submit it again"))
            raise
        except TStitchError as error:
            self._fail(error)
        except Exception as error:
            _log.exception("a request failed")
            self._fail(FailedWork(f"the engine failed: {first_line(error)}", hint="submit it again"))

    async def _draw(self) -> None:
        for left in reversed(range(_ENGINES)):
            try:
                while not await self._ask():
                    await asyncio.sleep(_WAIT)
                    self._renew()
                return
            except Exception as error:
                if not self._engine._lost(error):
                    raise
                _log.warning("an engine was lost with request %s: %s", self._asked.request_id, first_line(error))
                if not left:
                    problem = f"request {self._asked.request_id} was lost with {_ENGINES} engines"
                    self._fail(DeviceLost(problem, hint="submit it again"))
                    return
            self._renew()

    async def _ask(self) -> bool:
        """Whether it has ended; if not, the engines have no room for a request that one of them had accepted."""
        async with aclosing(self._engine._ask(self._asked)) as messages:
            async for message in messages:
                if isinstance(message, Accepted):
                    self._accept(message)
                elif isinstance(message, LaneEvent):
                    self._tell(message)
                elif isinstance(message, Done):
                    self._finish(message)
                    return True
                elif self._has_room_later(message.error):
                    return False
                else:
                    self._fail(message.error)
                    return True
        raise FailedWork("the engine did not say how a request ended", hint="submit it again")

    def _accept(self, message: Accepted) -> None:
        if self._handle is not None:
            return
        asked = self._asked
        self._handle = Handle(
            asked.request_id, asked.model, message.plan, asked.options, message.n, priority=asked.priority,
            deadline=None if asked.latency_budget_ms is None else self._began + asked.latency_budget_ms / 1e3,
            adapted=message.adapted, estimate=message.estimate, cancel=self._engine._end,
        )  # fmt: skip
        if not self._first.done():
            self._first.set_result(self._handle)

    def _tell(self, event: LaneEvent) -> None:
        place = (event.image, event.step)
        if self._handle is not None and place not in self._told:
            self._told.add(place)
            self._handle._tell(event)

    def _finish(self, message: Done) -> None:
        assert self._handle is not None
        times = message.times
        self._handle._took(queued=times.queued, encode=times.encode, denoise=times.denoise, decode=times.decode)
        self._handle._finish(message.result)

    def _fail(self, error: TStitchError) -> None:
        if self._handle is not None:
            self._handle._finish(error)
        elif not self._first.done():
            self._first.set_exception(error)

    def _has_room_later(self, error: TStitchError) -> bool:
        full = isinstance(error, Overloaded | Closed)
        return self._handle is not None and full and time.monotonic() < self._end

    def _renew(self) -> None:
        """What is left of the time, and the plan that was accepted. It was accepted: no budget refuses it now."""
        asked = self._asked
        if asked.timeout is not None:
            left = self._end - time.monotonic()
            if left <= 0:
                raise OutOfTime("the request took longer than its time-out", hint="ask for fewer steps or images")
            asked = replace(asked, timeout=left)
        if self._handle is not None:
            asked = replace(asked, latency_budget_ms=None)
        if self._handle is not None and self._handle.adapted is not None:
            keywords = {**asked.options.plan.explicit(), "fraction": None, "rounding": None}
            keywords |= {"steps": self._handle.plan.steps, "schedule": list(self._handle.plan.schedule.names)}
            asked = replace(asked, options=replace(asked.options, plan=PlanOptions.from_keywords(keywords)))
        self._asked = asked
