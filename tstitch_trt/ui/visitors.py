"""Whose turn it is to draw: a line with a bound, in which pages that were closed lose their place."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tstitch_engines.errors import Busy, Cancelled, Closed

__all__ = ["Bucket", "Drawing", "DrawingQueue", "Visitors"]

_GRACE: Final = 1.0  # seconds that a page may take to come back for its pictures
_POLL: Final = 0.1  # seconds between two looks at whether a page that waits is still there
_MOST_ADDRESSES: Final = 4096
_STOP: Final = 30.0  # seconds that the step of a drawing may take


class Bucket:
    """How often an address may do something: ``burst`` times at once, and then ``per_second``."""

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst, self._per_second = burst, per_second
        self._left: dict[str, tuple[float, float]] = {}  # address -> how many are left, and when

    def take(self, address: str, cost: float = 1) -> bool:
        """Whether one more is allowed. ``cost`` 0 asks without using it up."""
        now = time.monotonic()
        left, then = self._left.pop(address, (float(self._burst), now))
        left = min(self._burst, left + (now - then) * self._per_second)
        allowed = left >= 1
        self._left[address] = (left - cost if allowed else left, now)
        if len(self._left) > _MOST_ADDRESSES:
            del self._left[next(iter(self._left))]
        return allowed


class Visitors:
    """The pages that listen for results, by Gradio's name of their session."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        with self._lock:
            self._open[session] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[session] -= 1
                if not self._open[session]:
                    del self._open[session]

    def here(self, session: str) -> bool:
        return session in self._open


class Drawing:
    """One press of the button. ``units``: images times steps, ``done`` of them so far."""

    def __init__(self, queue: DrawingQueue, session: str, address: str, units: int) -> None:
        self.session, self.address = session, address
        self.units, self.done = units, 0
        self._queue = queue
        self._seen = time.monotonic()

    @property
    def gone(self) -> bool:
        """Whether nobody listens for its pictures any more."""
        now = time.monotonic()
        if self._queue.visitors.here(self.session):
            self._seen = now
        return now - self._seen > self._queue.grace

    def check(self) -> None:
        """Raises ``Cancelled`` when its page was closed, and ``Closed`` when the server stops."""
        self._queue.check_open()
        if self.gone or not self._queue.holds(self):
            raise Cancelled("the page was closed", hint="open it again")


class DrawingQueue:
    """One drawing at a time, first come, first served; ``limit`` wait at most.

    A page has one place in the line, and an address at most half of the places.
    """

    def __init__(self, limit: int, *, seconds_per_unit: float, grace: float = _GRACE) -> None:
        """``seconds_per_unit``: of one step of one image, until drawings have been timed. ``grace``: the seconds that a
        page may take to come back."""
        self.visitors = Visitors()
        self.limit = limit
        self.grace = grace
        self.cut_off = False  # whether a drawing was under way when this was closed
        self._rate = seconds_per_unit
        self._line: list[Drawing] = []
        self._changed = threading.Condition()
        self._closed = False

    def seconds(self, before: Drawing | None = None) -> float:
        """How long it is until all in the line, or those before ``before``, are drawn."""
        line = self._line if before is None else self._line[: self._line.index(before)]
        return self._rate * sum(drawing.units - drawing.done for drawing in line)

    def holds(self, drawing: Drawing) -> bool:
        return drawing in self._line

    def check_open(self) -> None:
        if self._closed:
            raise Closed("the page is being stopped", hint="start it again: tstitch-trt ui")

    @contextmanager
    def turn(self, session: str, address: str, units: int) -> Iterator[Drawing]:
        """A place in the line. Raises ``Busy`` at once where there is none, and ``Closed``."""
        drawing = Drawing(self, session, address, units)
        with self._changed:
            self.check_open()
            self._line = [one for one in self._line if not one.gone]
            self._admit(drawing)
            self._line.append(drawing)
        try:
            yield drawing
        finally:
            with self._changed:
                if drawing in self._line:
                    self._line.remove(drawing)
                self._changed.notify_all()

    def wait(self, drawing: Drawing) -> Iterator[float]:
        """Until it is this drawing's turn: the seconds that are left, again and again. Raises as ``Drawing.check``."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._line[:1] == [drawing], _POLL)
                drawing.check()
                self._line = [one for one in self._line if not one.gone]
                if self._line[0] is drawing:
                    return
                left = self.seconds(drawing)
            yield left

    def timed(self, drawing: Drawing, units: int, seconds: float) -> None:
        """``units`` of the drawing took so long."""
        drawing.done += units
        if units:
            self._rate += (seconds / units - self._rate) / 2

    def close(self, timeout: float = _STOP) -> None:
        """Refuses those that come, ends those that wait or draw, and waits for that."""
        with self._changed:
            self.cut_off = bool(self._line)
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._line, timeout)

    def _admit(self, drawing: Drawing) -> None:
        about = f"about {max(1, round(self.seconds()))} s"
        if any(one.session == drawing.session for one in self._line):
            raise Busy(f"this page draws already, for {about} more", hint="wait for its pictures, or load it anew")
        if len(self._line) > self.limit:
            raise Busy(f"busy, {about}: {self.limit} drawings wait already", hint="try again then")
        share = max(1, self.limit // 2)
        if sum(one.address == drawing.address for one in self._line) > share:
            raise Busy(
                f"busy, {about}: {share} drawings of this address wait already", hint="close other pages, or try then"
            )
