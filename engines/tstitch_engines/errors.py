"""The errors of tstitch-trt: ``BadInput``, ``FailedWork`` and their kinds, all of them ``TStitchError``.

Every message says what is wrong with the value that was got and what is allowed; ``hint`` names the flag, call or
command that mends it and is printed on a line of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any

__all__ = [
    "BadBundle",
    "BadCheckpoint",
    "BadEngine",
    "BadInput",
    "BadSchedule",
    "BuildFailed",
    "Busy",
    "Cancelled",
    "Closed",
    "DeviceLost",
    "FailedWork",
    "NotCalibrated",
    "NotFinite",
    "NotFiniteInput",
    "OutOfMemory",
    "OutOfProfile",
    "OutOfTime",
    "Overloaded",
    "PairMismatch",
    "TStitchError",
    "Unavailable",
    "UnknownName",
    "Unsafe",
    "Untrusted",
    "first_line",
    "nearest",
    "unknown_name",
]


_SHOWN = 80  # characters of an unknown name that a message repeats
_LONGEST = 6000  # of a message or hint: what was got may be as long as it likes
# Signs that move the cursor of a terminal or turn its text: names in files and of files come from anywhere
_CONTROLS = [
    *range(9),
    *range(11, 32),
    *range(127, 160),
    0x2028,
    0x2029,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_ESCAPED = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CONTROLS}


class TStitchError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is the message, then ``hint: ...`` on its own line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        self.message, self.hint = _printable(message), _printable(hint)
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments would be lost by the default pickling
        return (partial(type(self), hint=self.hint), (self.message,))


def _printable(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1000]} ... {text[-900:]}"
    return text.translate(_ESCAPED)


class BadInput(TStitchError):
    """What was asked for can't be right. Exit code 2."""

    exit_code = 2


class UnknownName(BadInput):
    """A name that does not exist; the nearest known one is named."""


class BadSchedule(BadInput):
    """A schedule that does not fit the steps or the members."""


class BadCheckpoint(BadInput):
    """A file that is no checkpoint of the family, or that carries code."""


class BadBundle(BadInput):
    """A bundle or manifest that is damaged, foreign or unsafe."""


class BadEngine(BadInput):
    """An engine file that is truncated, altered or not for this machine."""


class Unsafe(BadBundle, BadEngine):
    """A file that carries pickled objects, or would make a library read files that do not belong to it."""


class Untrusted(BadBundle):
    """An engine that may run code when it is loaded, of a bundle that nobody vouched for."""


class PairMismatch(BadInput):
    """Members that can't share one latent."""


class OutOfProfile(BadInput):
    """A size outside what the engine was built for."""


class NotCalibrated(BadInput):
    """No calibration of these engines on this machine."""


class Unavailable(BadInput):
    """A library, device or feature that this machine lacks."""


class FailedWork(TStitchError):
    """The request was right, but carrying it out failed. Exit code 1."""


class BuildFailed(FailedWork):
    """An export or a compilation failed."""


class OutOfTime(FailedWork):
    """Work in a child process took longer than its limit, and was ended."""


class OutOfMemory(FailedWork):
    """Work needs more memory than is free, or than was allowed."""


class NotFinite(FailedWork):
    """NaN or infinity in the latents.

    ``failed``: the images it happened to (``tstitch_trt.FailedImage``), where that is known. ``result``: the others
    (``tstitch_trt.Result``), as far as they had been drawn; ``None`` where none had.
    """

    failed: tuple[Any, ...] = ()
    result: Any = None

    def __reduce__(self) -> tuple[object, ...]:
        on_host = self.result is not None and self.result.on_host
        return (*super().__reduce__(), {"failed": self.failed, "result": self.result if on_host else None})


class NotFiniteInput(BadInput, NotFinite):
    """NaN or infinity in an array that was given."""


class Cancelled(FailedWork):
    """Stopped by the caller."""


class Busy(FailedWork):
    """The runtime had other requests for longer than the caller would wait."""


class Overloaded(Busy):
    """A server's queue is full, or a latency budget can't be met under its load.

    ``retry_after``: seconds after which it is worth trying again; ``None``: it can't be met even without load.
    """

    retry_after: float | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"retry_after": self.retry_after})


class Closed(FailedWork):
    """The runtime was closed."""


class DeviceLost(FailedWork):
    """The device can't be used by this process any more: every later call on it fails."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says something, or the name of its class."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(got: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``got``, or ``None`` when nothing is close."""
    matches = difflib.get_close_matches(got[:100], list(known), n=1, cutoff=0.5)  # its time is the square of the length
    return matches[0] if matches else None


def unknown_name(kind: str, got: str, known: Iterable[str], *, hint: str | None = None) -> UnknownName:
    """The error for a ``kind`` (``"solver"``, ``"member"``...) called ``got`` that is not among ``known``."""
    names, got = list(known), got[:_SHOWN]
    close = nearest(got, names)
    fix = f"did you mean {close!r}?" if close else f"use one of: {', '.join(names)}"
    return UnknownName(
        f"unknown {kind} {got!r}; known: {', '.join(names) or 'none'}", hint=f"{fix} {hint}" if hint else fix
    )
