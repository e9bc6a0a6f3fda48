"""Progress on stderr: a live bar on a terminal, nothing elsewhere. Obeys ``NO_COLOR``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tstitch_engines.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Phases", "ProgressBar", "log", "progress_bar"]

_REDRAW_SECONDS = 0.1


class Phases:
    """Turns counted work into the phase and share of a ``Progress``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.phase("", 0.0, 1.0, 1)

    def phase(self, text: str, start: float, stop: float, ticks: float = 1) -> None:
        """Begins the part of the work from share ``start`` to ``stop``, which is done after so many ticks."""
        self._text, self._start, self._stop = text, start, stop
        self._ticks, self._done = max(ticks, 1), 0.0
        if text:
            self._progress(text, start)

    def tick(self, amount: float = 1, text: str = "") -> None:
        """``amount`` ticks are done; 0 changes the text alone."""
        self._done += amount
        self._text = text or self._text
        self._progress(self._text, self._start + (self._stop - self._start) * min(self._done / self._ticks, 1.0))


class ProgressBar:
    """A bar with a text; called with a phase and a share it is a ``Progress``.

    It is drawn by the calls that move it, at most ten times a second: a thread that draws would slow what is measured.
    """

    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar = bar
        self._task = task
        self._drawn = 0.0

    def __call__(self, phase: str, share: float) -> None:
        self.update(done=share, text=phase)

    def update(self, *, done: float | None = None, text: str | None = None, total: float | None = None) -> None:
        self._bar.update(self._task, completed=done, description=text, total=total)
        self._draw()

    def advance(self, amount: float = 1) -> None:
        self._bar.advance(self._task, amount)
        self._draw()

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._bar.refresh()


@contextmanager
def progress_bar(text: str, total: float = 1, *, counted: str = "", logs: Sequence[str] = ()) -> Iterator[ProgressBar]:
    """A bar on stderr while the block runs, removed at its end. ``counted`` names the unit ("steps").

    Messages from level INFO of the loggers ``logs`` are printed above the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    amount = (MofNCompleteColumn(), TextColumn(counted)) if counted else (TextColumn("{task.percentage:>3.0f} %"),)
    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    )
    with bar, _above(console, logs):
        yield ProgressBar(bar, bar.add_task(text, total=total))


@contextmanager
def _above(console: Console, names: Sequence[str]) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)

    handler = Handler()
    before = [(logger, logger.level, logger.propagate) for logger in map(logging.getLogger, names)]
    for logger, _, _ in before:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def log(text: str) -> None:
    """One line on stderr."""
    import click

    click.echo(text, err=True)
