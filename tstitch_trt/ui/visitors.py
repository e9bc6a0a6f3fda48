"""Who has a drawing under way: one a page, so many pictures an address, and none for pages that were closed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tstitch_engines.errors import Busy, Cancelled

__all__ = ["Bucket", "Drawing", "Drawings", "Visitors"]

_GRACE: Final = 1.0  # seconds that a page may take to come back for its pictures
_MOST_ADDRESSES: Final = 4096


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
    """The pages that listen for results, by Gradio's name of their session. For the event loop of the server."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        self._open[session] += 1
        try:
            yield
        finally:
            self._open[session] -= 1
            if not self._open[session]:
                del self._open[session]

    def here(self, session: str) -> bool:
        return session in self._open


class Drawing:
    """One press of the button, for ``images`` pictures."""

    def __init__(self, drawings: Drawings, session: str, address: str, images: int) -> None:
        self.session, self.address, self.images = session, address, images
        self._drawings = drawings
        self._seen = time.monotonic()

    @property
    def gone(self) -> bool:
        """Whether nobody listens for its pictures any more."""
        now = time.monotonic()
        if self._drawings.visitors.here(self.session):
            self._seen = now
        return now - self._seen > self._drawings.grace

    def check(self) -> None:
        """Raises ``Cancelled`` when its page was closed."""
        if self.gone:
            raise Cancelled("the page was closed", hint="open it again")


class Drawings:
    """Those under way: one a page, and at most ``images`` pictures an address. For the event loop of the server.

    What all addresses may ask for together is the engine's to say.
    """

    def __init__(self, images: int, *, grace: float = _GRACE) -> None:
        """``grace``: the seconds that a page may take to come back."""
        self.visitors = Visitors()
        self.grace = grace
        self._images = images
        self._open: list[Drawing] = []

    def __len__(self) -> int:
        return len(self._open)

    def visit(self, session: str) -> Drawing:
        """A page that only looks on."""
        return Drawing(self, session, "", 0)

    def draws(self, session: str) -> bool:
        return any(one.session == session for one in self._open)

    @contextmanager
    def drawing(self, session: str, address: str, images: int) -> Iterator[Drawing]:
        """Raises ``Busy`` at once where there is no place."""
        drawing = Drawing(self, session, address, images)
        self._admit(drawing)
        self._open.append(drawing)
        try:
            yield drawing
        finally:
            self._open.remove(drawing)

    def _admit(self, drawing: Drawing) -> None:
        others = [one for one in self._open if not one.gone]
        if any(one.session == drawing.session for one in others):
            raise Busy("this page draws already", hint="wait for its pictures, or load it anew")
        under_way = sum(one.images for one in others if one.address == drawing.address)
        if under_way + drawing.images > self._images:
            raise Busy(
                f"{under_way} pictures of this address are being drawn, {drawing.images} more are too many; allowed "
                f"are {self._images} at once",
                hint="wait for those, or close other pages",
            )
