"""The order of a runtime's work: one request at a time, first come, first served, until the runtime is closed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tstitch_engines.errors import BadInput, Busy, Cancelled, Closed

__all__ = ["Turn", "WorkQueue", "check_timeout"]


class Turn:
    """One request's use of the runtime's engines and buffers.

    ``thread``: the one that runs it; an iterator may be handed from thread to thread. ``step``: how often the request
    has gone on. ``mutex`` is held while it uses engines or buffers, and not in between, while its callback or the loop
    over its iterator runs.
    """

    def __init__(self, activate: Callable[[], None]) -> None:
        self.thread = 0
        self.step = 0
        self.cancelled = False
        self.running = False
        self.mutex = threading.RLock()
        self._activate = activate

    def check(self) -> None:
        """Raises ``Cancelled`` after the runtime was told to close. Called before each step."""
        if self.cancelled:
            raise Cancelled(
                "the runtime was closed while this request ran",
                hint="close() waits for requests of other threads, close(cancel=True) cancels them",
            )

    @contextmanager
    def work(self) -> Iterator[None]:
        """Engines and buffers may be used inside. Raises ``Cancelled``."""
        with self.mutex:
            self.check()
            outer, self.running = self.running, True
            try:
                self._activate()
                yield
            finally:
                self.running = outer

    @contextmanager
    def next_step(self) -> Iterator[None]:
        """``work`` that goes on with the request, on the calling thread."""
        with self.mutex:
            self.step += 1
            self.thread = threading.get_ident()
            with self.work():
                yield

    @contextmanager
    def after(self, step: int) -> Iterator[None]:
        """``work`` after ``step`` and before the next one. Raises ``BadInput`` where the request has gone on."""
        with self.mutex:
            if self.step != step:
                raise BadInput(
                    "this step is over, and its latents have been overwritten",
                    hint="read what is wanted of an event in the callback, or before the iterator goes on",
                )
            with self.work():
                yield


class WorkQueue:
    """Gives turns. Every call that uses engines or buffers takes one and gives it back, whatever happens."""

    def __init__(self, activate: Callable[[], None], timeout: float | None = None) -> None:
        """``activate`` makes the device usable on the calling thread. ``timeout``: seconds that calls wait, unless they
        say otherwise; ``None`` is for ever."""
        self._activate = activate
        self._timeout = check_timeout(timeout)
        self._changed = threading.Condition()
        self._state: Literal["open", "closing", "closed"] = "open"
        self._turn: Turn | None = None
        self._waiting: deque[Turn] = deque()
        self._free: Callable[[], None] | None = None

    def check_open(self) -> None:
        """Raises ``Closed``."""
        if self._state != "open":
            raise Closed("this runtime is closed", hint="load the bundle again: tstitch_trt.load(...)")

    @contextmanager
    def turn(self, timeout: float | None = None) -> Iterator[Turn]:
        """Waits for all that asked before. Raises ``Busy`` after ``timeout`` seconds, and ``Closed``."""
        wait = self._timeout if timeout is None else check_timeout(timeout)
        turn = Turn(self._activate)
        with self._changed:
            self.check_open()
            if self._mine() is not None:
                raise Busy(
                    "this thread's own request to this runtime is not done, and this call would wait for it for ever",
                    hint="go on to the end of its iterator or close it first; in a callback, wait until sample returns",
                )
            self._waiting.append(turn)
            try:
                came = self._changed.wait_for(
                    lambda: self._state != "open" or (self._turn is None and self._waiting[0] is turn),
                    None if wait is None else min(wait, threading.TIMEOUT_MAX),
                )
                self.check_open()
                if not came:
                    raise Busy(
                        f"the runtime was busy with other requests for {wait:g} s",
                        hint="give a longer timeout=, or load one runtime per thread",
                    )
                turn.thread = threading.get_ident()
                self._turn = turn
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        try:
            yield turn
        finally:
            with turn.mutex:  # nobody reads an event any more
                turn.step += 1
            self._release(turn)

    @contextmanager
    def work(self, timeout: float | None = None, *, between_steps: bool = False) -> Iterator[None]:
        """A turn for one piece of work.

        ``between_steps``: it uses nothing that a step uses, and may be done while this thread's own request is between
        two steps.
        """
        own = self._mine()
        if own is not None and between_steps and not own.running:
            with own.work():
                yield
            return
        with self.turn(timeout) as turn, turn.work():
            yield

    def close(self, free: Callable[[], None], *, cancel: bool) -> None:
        """Waits for the request that runs, or with ``cancel`` ends it before its next step; then calls ``free``, once.

        Requests that wait are refused with ``Closed``. The calling thread's own request can't be waited for and is
        cancelled. Called in the middle of its step, by a signal handler or a finaliser, this returns at once, and
        ``free`` is called when the request has ended.
        """
        with self._changed:
            if self._state == "closed":
                return
            self._state = "closing"
            self._changed.notify_all()
            turn, own = self._turn, self._mine()
            if turn is not None and (cancel or own is not None):
                turn.cancelled = True
                if own is not None and own.running:
                    self._free = free
                    return
        if turn is not None and turn.cancelled:
            with turn.mutex:  # the step that runs is done after this, and no other begins
                self._release(turn)
        with self._changed:
            self._changed.wait_for(lambda: self._turn is None)
            self._finish(free)

    def _mine(self) -> Turn | None:
        turn = self._turn
        return turn if turn is not None and turn.thread == threading.get_ident() else None

    def _release(self, turn: Turn) -> None:
        with self._changed:
            if self._turn is turn:
                self._turn = None
                if self._free is not None:
                    self._finish(self._free)
                self._changed.notify_all()

    def _finish(self, free: Callable[[], None]) -> None:
        if self._state != "closed":
            self._state = "closed"
            free()


def check_timeout(timeout: float | None) -> float | None:
    """Raises ``BadInput`` for what is no number of seconds."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is not None and not (number and timeout >= 0):
        raise BadInput(
            f"timeout = {timeout!r}; allowed are None (for ever) and seconds from 0 on", hint="e.g. timeout=30"
        )
    return timeout
