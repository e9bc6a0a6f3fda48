"""Checks of single values from outside. Each returns the value in its own type or raises ``BadInput``."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from tstitch_engines.errors import BadInput, unknown_name

__all__ = ["check_choice", "check_number", "check_text", "check_whole", "shown"]

_SHOWN = 80  # characters of a bad value that a message repeats


def shown(value: object) -> str:
    """``repr(value)`` for a message: short, without characters that can't be printed, and never an error itself."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, str | bytes):
        value = value[:_SHOWN]
    elif isinstance(value, Sequence) and len(value) > _SHOWN:
        return f"a {type(value).__name__} of {len(value)} values"
    try:
        text = repr(value)
    except Exception:  # whatever a foreign object's __repr__ does; and whole numbers of too many digits
        return f"something of type {type(value).__name__}"
    return text if len(text) <= _SHOWN + 2 else text[: _SHOWN - 3] + "..."


def check_whole(value: object, what: str, low: int = 0, high: int = 1_000_000) -> int:
    """A whole number from ``low`` to ``high``, not a bool."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise BadInput(
            f"{what} is {shown(value)}; allowed is a whole number from {low} to {high}",
            hint=f"e.g. {what}={max(low, 1)}, or leave it out",
        )
    return int(value)


def check_number(value: object, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A number from ``low`` to ``high``, not a bool. NaN passes where there is no bound: who uses it must check."""
    kind = int | float | np.integer | np.floating
    number = math.nan
    if isinstance(value, kind) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    bounded = math.isfinite(low) or math.isfinite(high)
    if isinstance(value, bool) or not isinstance(value, kind) or (bounded and not low <= number <= high):
        allowed = f"a number from {low:g} to {high:g}" if bounded else "a number"
        raise BadInput(f"{what} is {shown(value)}; allowed is {allowed}", hint=f"give {what} as {allowed}")
    return number


def check_text(value: object, what: str, *, example: str, most: int = 100_000) -> str:
    """A text of at most ``most`` characters that UTF-8 can write."""
    if not isinstance(value, str):
        raise BadInput(f"{what} is {shown(value)}; allowed is a text", hint=f"e.g. {what}={example!r}")
    if len(value) > most:
        raise BadInput(
            f"{what} has {len(value)} characters; allowed are {most}", hint=f"shorten {what} to {most} characters"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{what} is {shown(value)}: character {error.start} is half of a surrogate pair, which is no text",
            hint="decode the text from its bytes again, as UTF-8",
        ) from None
    return str(value)


def check_choice(value: object, what: str, allowed: Collection[str]) -> str:
    """One of the names ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise unknown_name(what, value[:_SHOWN] if isinstance(value, str) else shown(value), allowed)
    return value
