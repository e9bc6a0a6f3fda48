"""Progress on stderr: a live bar on a terminal, silence elsewhere; ``NO_COLOR`` is obeyed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress", "log", "progress"]

_REDRAW_SECONDS = 0.1


class Progress:
    """A bar with a text that counts up to a total. It is drawn by the calls that move it, at most ten times a second:
    a drawing thread would take time from what is being measured."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar = bar
        self._task = task
        self._drawn = 0.0

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
def progress(text: str, total: float, *, counted: str = "", logs: Sequence[str] = ()) -> Iterator[Progress]:
    """A bar on stderr while the block runs, taken away at its end. ``counted`` names what is counted ("steps").

    What the loggers named in ``logs`` say from INFO up is printed above the bar meanwhile.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    amount = (MofNCompleteColumn(), TextColumn(counted)) if counted else (TextColumn("{task.percentage:>3.0f} %"),)
    bar = Bar(
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
        yield Progress(bar, bar.add_task(text, total=total))


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
