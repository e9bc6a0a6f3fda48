"""The order of a runtime's work: one request at a time, first come, first served, until the runtime is closed.

Ctrl-C may raise between any two lines. So work is handed in as a function, and what must be undone is undone by a
``finally`` of the same frame whose first line does it: context managers of Python code have lines in between.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Final, Literal, TypeVar

from tstitch_engines.checks import plain_number, shown
from tstitch_engines.device.base import Device
from tstitch_engines.device.recording import is_held_here
from tstitch_engines.errors import BadInput, Busy, Cancelled, Closed, FailedWork

__all__ = ["EXIT", "InterpreterExit", "Turn", "WorkQueue", "check_timeout"]

T = TypeVar("T")

_LOOK: Final = 0.5  # seconds after which a thread that waits looks itself; usually it is told
_GRACE: Final = 1.0  # seconds that threads have to end when the interpreter does
_ENDED_HINT: Final = "ask again, of a runtime that is open; close() waits for what runs, close(cancel=True) cancels it"


class InterpreterExit:
    """No thread is inside an engine when the interpreter ends: it would stop a daemon thread there, and the process
    would abort.

    From ``wait`` on, calls of threads other than the one that ends the interpreter leave by ``SystemExit``, which ends
    a thread without a word.
    """

    def __init__(self) -> None:
        self._ending: threading.Thread | None = None
        self.inside: dict[object, None] = {}
        self._threads: set[threading.Thread] = set()

    def enter(self, key: object) -> None:
        """Before work in engines. ``inside.pop(key, None)`` follows whatever happens. Raises ``SystemExit``."""
        self.inside[key] = None  # before the question: `wait` sees this one, or this one sees who waits
        self.check()

    def run(self, work: Callable[[], T]) -> T:
        """``work``, which takes no turn and must not be stopped in the middle either: other libraries' native code."""
        key = object()
        try:
            self.enter(key)
            return work()
        finally:
            self.inside.pop(key, None)

    def check(self) -> None:
        """Raises ``SystemExit`` in a thread that the interpreter is about to stop."""
        if self._ending is not None and self._ending is not (thread := threading.current_thread()):
            self._threads.add(thread)
            raise SystemExit

    def begin(self) -> None:
        """To be called by the thread that ends the interpreter: no work begins any more."""
        self._ending = threading.current_thread()

    def wait(self) -> None:
        """Until the work that runs has been left, and for a moment until the threads have ended that did it."""
        while self.inside:
            sleep(0.002)
        until = monotonic() + _GRACE
        sleep(0.01)  # those that wait for a turn are told by now
        while any(thread.is_alive() for thread in self._threads.copy()) and monotonic() < until:
            sleep(0.002)


EXIT: Final = InterpreterExit()


class Turn:
    """One request's use of the runtime's engines and buffers.

    ``thread``: the one that runs it; an iterator may be handed from thread to thread. ``step``: how often the request
    has gone on. ``mutex`` is held while it uses engines or buffers, and not in between, while its callback or the loop
    over its iterator runs. ``lends``: further turns of the same thread are taken inside it. ``over``: the next request
    may begin, whatever becomes of this object. ``drop``: lets go of what the request holds.
    """

    def __init__(self, device: Device, *, lends: bool = False) -> None:
        self.thread: threading.Thread | None = None
        self.step = 0
        self.why_cancelled = ""
        self.over = False
        self.running = False
        self.lends = lends
        self.outer: Turn | None = None
        self.drop: Callable[[], None] = lambda: None
        self.mutex = threading.RLock()
        self._device = device

    def check(self) -> None:
        """Raises ``Cancelled`` once the request was told to end. Called before each step."""
        EXIT.check()
        if self.why_cancelled:
            raise Cancelled(self.why_cancelled, hint=_ENDED_HINT)

    def run(self, work: Callable[[], T]) -> T:
        """``work`` may use engines and buffers; their device is the thread's in it. Raises ``Cancelled``."""
        with self.mutex:
            outer = self.running
            try:
                if not outer:
                    EXIT.enter(self)
                self.check()
                self.running = True
                with self._device.kept():
                    self._device.activate()
                    return work()
            finally:
                self.running = outer
                if not outer:
                    EXIT.inside.pop(self, None)

    def next_step(self, work: Callable[[], T]) -> T:
        """``run`` that goes on with the request, on the calling thread."""
        with self.mutex:
            self.step += 1
            self.thread = threading.current_thread()
            return self.run(work)

    def after(self, step: int, work: Callable[[], T]) -> T:
        """``run`` after ``step`` and before the next one. Raises ``BadInput`` where the request has gone on."""
        with self.mutex:
            if not self._past(step):
                found = self.run(work)
                if not self._past(step):
                    return found
        raise BadInput(
            "this step is over, and its latents have been overwritten",
            hint="read what is wanted of an event in the callback, or before the iterator goes on",
        )

    def _past(self, step: int) -> bool:
        return self.step != step or (self.over and not self.why_cancelled)


class WorkQueue:
    """Gives turns. Every call that uses engines or buffers takes one and gives it back, whatever happens."""

    def __init__(self, device: Device, timeout: float | None = None) -> None:
        """``timeout``: seconds that calls wait, unless they say otherwise; ``None`` is for ever."""
        self._device = device
        self._timeout = check_timeout(timeout)
        self._lock = threading.RLock()  # never held while a turn's mutex is asked for
        self._changed = threading.Condition(self._lock)
        self._state: Literal["open", "closing", "closed"] = "open"
        self._turn: Turn | None = None
        self._waiting: deque[Turn] = deque()
        self._free: Callable[[], None] | None = None
        self._process = os.getpid()

    def check_open(self) -> None:
        """Raises ``Closed``, and ``FailedWork`` in a fork."""
        EXIT.check()
        if self._forked:
            raise FailedWork(
                f"this runtime was loaded by process {self._process}, of which this one ({os.getpid()}) is a fork: its "
                "engines have no threads here",
                hint="load the bundle after the fork, once in each process",
            )
        if self._state != "open":
            raise Closed("this runtime is closed", hint="load the bundle again: tstitch_trt.load(...)")

    def read(self, look: Callable[[], T]) -> T:
        """What ``look`` sees of an open runtime, at any time: it waits for no request. Raises ``Closed``."""
        self.check_open()  # before the lock, which a thread that a fork left behind may hold for ever
        with self._lock:
            self.check_open()
            return look()

    def new(self, *, lends: bool = False) -> Turn:
        """A turn for ``begin`` and ``end``."""
        return Turn(self._device, lends=lends)

    def begin(self, turn: Turn, timeout: float | None = None) -> None:
        """Waits for all that asked before. Raises ``Busy`` after ``timeout`` seconds, and ``Closed``.

        The caller sets ``over`` and calls ``end``, also when this raises.
        """
        wait = self._timeout if timeout is None else check_timeout(timeout)
        until = None if wait is None else monotonic() + min(wait, threading.TIMEOUT_MAX)
        me = threading.current_thread()
        self.check_open()
        with self._lock:
            self.check_open()
            current = self._current()
            if any(each.thread is me for each in _chain(current)):
                assert current is not None, "it is the first of the chain"
                if not (current.thread is me and current.lends):
                    raise Busy(
                        "this thread's own request to this runtime is not done, and this call would wait for it for "
                        "ever",
                        hint="go on to the end of its iterator or close it first; in a callback, wait until sample "
                        "returns",
                    )
                turn.outer = current
            else:
                self._wait(turn, wait, until)
            turn.thread = me
            self._turn = turn

    def _wait(self, turn: Turn, wait: float | None, until: float | None) -> None:
        self._waiting.append(turn)
        try:
            while True:
                self.check_open()
                turn.check()
                while self._waiting[0].over:
                    self._waiting.popleft()
                if self._current() is None and self._waiting[0] is turn:
                    return
                left = _LOOK if until is None else min(_LOOK, until - monotonic())
                if left <= 0:
                    raise Busy(
                        f"the runtime was busy with other requests for {wait:g} s",
                        hint="give a longer timeout=, or load one runtime per thread",
                    )
                self._changed.wait(left)
        finally:
            self._waiting.remove(turn)
            self._changed.notify_all()

    def end(self, turn: Turn) -> None:
        """Tells those that wait that ``turn`` is over."""
        with self._lock:
            if self._free is not None and self._current() is None:
                self._finish(self._free)
            self._changed.notify_all()

    def do(self, work: Callable[[], T], timeout: float | None = None, *, between_steps: bool = False) -> T:
        """A turn for one piece of work.

        ``between_steps``: it uses nothing that a step uses, and may be done while this thread's own request is between
        two steps.
        """
        check_timeout(timeout)
        own, me = self._current(), threading.current_thread()
        if own is not None and own.thread is me and between_steps and not own.running:
            return own.run(work)
        turn = self.new()
        try:
            self.begin(turn, timeout)
            return turn.run(work)
        finally:
            turn.over = True
            self.end(turn)

    @contextmanager
    def exclusive(self, timeout: float | None = None) -> Iterator[Turn]:
        """A turn for a ``with`` block, in which the calls of the same thread are done, and nobody else's."""
        turn = self.new(lends=True)
        try:
            self.begin(turn, timeout)
            yield turn
        finally:
            try:
                self.end_inner(turn)
            finally:
                turn.over = True
                self.end(turn)

    def end_inner(self, turn: Turn) -> None:
        """Cancels what was begun inside ``turn`` and is not done: an iterator that was left open. Waits for its step.

        Not for turns that have ended already.
        """
        for inner in self._inside(turn):
            self._stop(inner, "the block that this request was begun in has ended")

    def cancel(self, turn: Turn, why: str) -> None:
        """Ends a request before its next step, or while it waits. Does not wait itself."""
        turn.why_cancelled = turn.why_cancelled or why
        with self._lock:
            self._changed.notify_all()

    def close(self, free: Callable[[], None], *, cancel: bool, timeout: float | None = None) -> None:
        """Waits for the request that runs, or with ``cancel`` ends it before its next step; then calls ``free``, once.

        Requests that wait are refused with ``Closed``. The calling thread's own request can't be waited for and is
        cancelled. Called in the middle of its step, by a signal handler or a finaliser, this returns at once, and
        ``free`` is called when the request has ended; so it does in the middle of another runtime's recording or
        compiling, for which the request may wait. Raises ``Busy`` after ``timeout`` seconds; the runtime takes no
        requests then, and another ``close`` may cancel. Does nothing in a fork.
        """
        if self._forked:  # nothing here is this process's to wait for or to free
            return
        until = None if check_timeout(timeout) is None else monotonic() + min(timeout or 0, threading.TIMEOUT_MAX)
        me, why = threading.current_thread(), "the runtime was closed while this request ran"
        with self._lock:
            if self._state == "closed":
                return
            self._state = "closing"
            self._changed.notify_all()
            turns = _chain(self._current())
            own = [turn for turn in turns if turn.thread is me]
            stopped = turns if cancel or own else []
            for turn in stopped:
                turn.why_cancelled = turn.why_cancelled or why
            if any(turn.running for turn in own) or (turns and is_held_here()):
                self._free = free
                return
        for turn in stopped:
            while until is not None and turn.running:  # in its last step
                if monotonic() >= until:
                    raise Busy(f"a step still runs after {timeout:g} s", hint="steps can't be interrupted: wait longer")
                sleep(0.002)
            self._stop(turn, why)
        with self._lock:
            while self._current() is not None:
                left = _LOOK if until is None else min(_LOOK, until - monotonic())
                if left <= 0:
                    raise Busy(f"a request still runs after {timeout:g} s", hint="close(cancel=True) cancels it")
                self._changed.wait(left)
            self._finish(free)

    def _stop(self, turn: Turn, why: str) -> None:
        turn.why_cancelled = turn.why_cancelled or why
        with turn.mutex:  # the step that runs is done after this, and no other begins
            turn.over = True
            turn.drop()
        self.end(turn)

    @property
    def _forked(self) -> bool:
        return self._process != os.getpid()

    def _current(self) -> Turn | None:
        """The innermost turn that is on."""
        found = self._turn
        while found is not None and found.over:
            found = found.outer
        return found

    def _inside(self, turn: Turn) -> list[Turn]:
        """The turns inside ``turn``, the innermost first."""
        chain = _chain(self._current())
        return chain[: chain.index(turn)] if turn in chain else []

    def _finish(self, free: Callable[[], None]) -> None:
        if self._state != "closed":
            self._state, self._free = "closed", None
            free()


def _chain(turn: Turn | None) -> list[Turn]:
    """The turn and those it was taken inside."""
    found = []
    while turn is not None:
        found.append(turn)
        turn = turn.outer
    return found


def check_timeout(timeout: object, what: str = "timeout") -> float | None:
    """Seconds to wait, ``None`` for ever. Raises ``BadInput`` for what is no number of seconds."""
    number = plain_number(timeout)
    if timeout is not None and (number is None or not number >= 0):
        raise BadInput(
            f"{what} = {shown(timeout)}; allowed are None (for ever) and seconds from 0 on", hint="e.g. timeout=30"
        )
    return None if number is None else float(min(number, threading.TIMEOUT_MAX))
