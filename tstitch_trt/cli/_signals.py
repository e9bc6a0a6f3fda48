"""Ctrl-C, SIGTERM and SIGHUP unwind a command as an error does: what it has in the making is removed on the way."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import click

from tstitch_trt.start import end_at_once

__all__ = ["caught_signals", "queued_signals", "watch_signals"]

_PATIENCE: Final = 10.0  # seconds of tidying up in which further signals are not heard


@contextmanager
def watch_signals() -> Iterator[list[int]]:
    """A list of the signals that came so far.

    Ctrl-C raises ``KeyboardInterrupt`` as always, the others ``SystemExit(128 + number)``. A library may turn that into
    an error of its own: an extension module that is being imported fails with ``ImportError``. Another signal does not
    end the tidying up after the first one. Signals that the program ignores or handles stay as they are.
    """
    caught: list[int] = []
    began = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal began
        if caught and _unwinding() and time.monotonic() - began < _PATIENCE:
            return
        caught.append(number)
        began = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, end_at_once):
                before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signal.SIGINT in caught:
            # Python notes a Ctrl-C that ends an exec or eval of text, as in namedtuple, and `python -m` would end by
            # that signal instead of our exit code. The next exec of text clears the note.
            exec("")  # noqa: S102


def caught_signals() -> list[int]:
    """The signals that came so far, in a command that runs under ``watch_signals``."""
    found: list[int] | None = click.get_current_context().find_root().obj
    return found or []


@contextmanager
def queued_signals(*numbers: int, found: queue.SimpleQueue[int] | None = None) -> Iterator[queue.SimpleQueue[int]]:
    """The signals ``numbers`` wait in a queue (``found``, or one of its own) while the block runs, and unwind nothing.

    Of those but SIGHUP a second one ends the process at once, with 128 + its number.
    """
    into: queue.SimpleQueue[int] = queue.SimpleQueue() if found is None else found
    endings = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal endings
        endings += number != signal.SIGHUP
        if endings > 1:
            os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
            os._exit(128 + number)
        into.put(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield into
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwinding() -> bool:
    """Whether an interruption is on its way up: we are in an ``except``, a ``finally`` or the end of a ``with``."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return True
        error = error.__context__
    return False
