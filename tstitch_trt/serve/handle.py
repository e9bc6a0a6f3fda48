"""A request that was accepted: wait for it, follow it, cancel it, from threads and from event loops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal
from weakref import WeakMethod

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import Busy, Cancelled
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.runtime.result import Result
from tstitch_trt.runtime.work_queue import check_timeout

__all__ = ["Handle", "LaneEvent", "State", "Times"]

State = Literal["queued", "encoding", "denoising", "decoding", "done", "failed", "cancelled"]
_KEPT: Final = 4096  # events that a slow reader may be behind


@dataclass(frozen=True)
class LaneEvent:
    """Image ``image`` of the request took ``step`` (from 1) of ``steps`` on ``member``.

    ``preview``: its estimate after that step as a picture, uint8 ``[H,W,C]``, where one was due.
    """

    image: int
    step: int
    steps: int
    member: str
    preview: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Times:
    """Seconds. ``queued``: before it was encoded, and from then until its first lane had a place. ``encode``,
    ``denoise``, ``decode``: from the begin to the end of each stage, which overlap where images end apart."""

    queued: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


class Handle:
    """Made by ``Engine.submit``. ``await handle`` and ``handle.result()`` give the ``Result`` or raise what failed.

    ``async for event in handle`` and ``handle.progress()`` give a ``LaneEvent`` for every step of every image from
    then on; who reads slowly loses the oldest. A task that is cancelled while it awaits a handle cancels the request.

    ``n``: its images. ``plan``: how they are drawn. ``adapted``: what was made cheaper under load (``"fraction 0.4 ->
    0.7"``), ``None`` where nothing was. ``estimate``: seconds from its submission to its end, predicted then.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - the field's name
        model: str,
        plan: Plan,
        options: SampleOptions,
        n: int,
        *,
        priority: int,
        deadline: float | None,
        adapted: str | None,
        estimate: float,
        cancel: Callable[[Handle, Exception], None],
    ) -> None:
        self.id = id
        self.model = model
        self.plan = plan
        self.options = options
        self.n = n
        self.priority = priority
        self.deadline = deadline
        self.adapted = adapted
        self.estimate = estimate
        self.state: State = "queued"
        self.submitted = time.monotonic()
        self._cancel = cancel
        self._times = Times()
        self._future: Future[Result] = Future()
        self._changed = threading.Condition()
        self._events: deque[LaneEvent] = deque(maxlen=_KEPT)
        self._count = 0
        self._wakers: list[Callable[[], None]] = []
        self._ended = False
        over = WeakMethod(self._over)  # else the two keep each other, and the pictures, until the garbage is collected
        self._future.add_done_callback(lambda future: None if (call := over()) is None else call(future))

    # --- for whoever asked

    def result(self, timeout: float | None = None) -> Result:
        """Waits. Raises what failed, ``Cancelled``, and ``Busy`` after ``timeout`` seconds; the request goes on."""
        check_timeout(timeout)
        try:
            return self._future.result(timeout)
        except CancelledError:
            raise Cancelled("the request was cancelled", hint="submit it again") from None
        except FutureTimeout:
            if self._future.done():
                raise
            raise Busy(
                f"request {self.id} is {self.state} after {timeout:g} s", hint="wait longer, or cancel() it"
            ) from None

    def done(self) -> bool:
        """Whether it has ended, however."""
        return self._future.done()

    def error(self) -> BaseException | None:
        """Why it failed; ``None`` while it goes on and where it has a result."""
        if not self._future.done():
            return None
        if self._future.cancelled():
            return Cancelled("the request was cancelled", hint="submit it again")
        return self._future.exception()

    def cancel(self, why: str = "the request was cancelled") -> bool:
        """Ends the request: its lanes are free at the next step. Whether it had not ended before."""
        if self.done():
            return False
        self._cancel(self, Cancelled(why, hint="submit it again"))
        return True

    def add_done_callback(self, call: Callable[[Handle], object]) -> None:
        """Calls ``call(handle)`` when it has ended, at once if it has. On some thread of the engine's: be quick."""
        self._future.add_done_callback(lambda _: call(self))

    @property
    def times(self) -> Times:
        """So far, and final once it is done."""
        if self.done():
            return self._times
        return replace(self._times, total=time.monotonic() - self.submitted)

    def progress(self) -> Iterator[LaneEvent]:
        """Every step as it is done, until the request has ended. Does not raise what failed: ``result`` does."""
        seen = self._count - len(self._events)
        while True:
            with self._changed:
                while self._count == seen and not self.done():
                    self._changed.wait()
                events, seen = self._since(seen)
                over = self.done() and not events
            if over:
                return
            yield from events

    def __await__(self) -> Generator[Any, None, Result]:
        return self._awaited().__await__()

    async def _awaited(self) -> Result:
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            if not self._future.cancelled() or (task := asyncio.current_task()) is None or task.cancelling():
                raise
            raise Cancelled("the request was cancelled", hint="submit it again") from None

    async def __aiter__(self) -> AsyncIterator[LaneEvent]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:  # the loop was closed before its iterator
                self._unlisten(wake)

        with self._changed:
            self._wakers.append(wake)
            seen = self._count - len(self._events)
        try:
            while True:
                woken.clear()
                with self._changed:
                    events, seen = self._since(seen)
                    over = self.done() and not events
                if over:
                    return
                for event in events:
                    yield event
                if not events:
                    await woken.wait()
        finally:
            self._unlisten(wake)

    def _unlisten(self, wake: Callable[[], None]) -> None:
        with self._changed:
            if wake in self._wakers:
                self._wakers.remove(wake)

    def _since(self, seen: int) -> tuple[list[LaneEvent], int]:
        lost = self._count - len(self._events)
        return list(self._events)[max(0, seen - lost) :], self._count

    # --- for the engine

    def _enter(self, state: State) -> None:
        if not self.done():
            self.state = state

    def _took(self, **seconds: float) -> None:
        self._times = replace(self._times, **seconds)

    def _tell(self, event: LaneEvent) -> None:
        with self._changed:
            self._events.append(event)
            self._count += 1
            self._changed.notify_all()
            wakers = tuple(self._wakers)
        for wake in wakers:
            wake()

    def _finish(self, outcome: Result | BaseException) -> None:
        """Ends it, unless it has ended."""
        with self._changed:
            if self._ended:
                return
            self._ended = True
            failed = isinstance(outcome, BaseException)
            self.state = ("cancelled" if isinstance(outcome, Cancelled) else "failed") if failed else "done"
            self._times = replace(self._times, total=time.monotonic() - self.submitted)
        with suppress(InvalidStateError):  # an event loop has cancelled it at this moment
            if isinstance(outcome, BaseException):
                self._future.set_exception(outcome)
            else:
                self._future.set_result(outcome)

    def _over(self, future: Future[Result]) -> None:
        with self._changed:
            if future.cancelled():
                self.state = "cancelled"
            self._changed.notify_all()
            wakers = tuple(self._wakers)
        for wake in wakers:
            wake()
        if future.cancelled():  # by an event loop: a task that awaited it
            self._cancel(self, Cancelled("the task that awaited it was cancelled", hint="submit it again"))
