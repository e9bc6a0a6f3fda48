"""How much time and memory work in a child process may take, and how people write that."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from tstitch_engines.checks import plain_number, shown
from tstitch_engines.errors import BadInput

__all__ = ["DEFAULT", "Limits", "parse_size", "show_size", "show_time"]

_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES: Final = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_MOST: Final = 1 << 60  # more than any machine has; keeps sums within 64 bits
_LONGEST: Final = 365 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``time`` in seconds, ``memory`` in bytes; ``None``: the default of the work, and what is free when it starts."""

    time: float | None = None
    memory: int | None = None

    @staticmethod
    def of(time_limit: float | str | None = None, memory_limit: int | str | None = None) -> Limits:
        """Of the keywords ``time_limit`` (seconds, or ``30m``) and ``memory_limit`` (bytes, or ``8GiB``).

        Raises ``BadInput`` naming the keyword.
        """
        return Limits(
            time=None if time_limit is None else _time(time_limit),
            memory=None if memory_limit is None else parse_size(memory_limit, "memory_limit", "--memory-limit 8GiB"),
        )


DEFAULT: Final = Limits()


def _time(value: object) -> float:
    found: float | None = None
    if type(value) is str:
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)\s*", value.lower())
        if match is not None and match[2] in _SECONDS:
            found = float(match[1]) * _SECONDS[match[2]]
    elif (number := plain_number(value)) is not None and abs(number) <= _LONGEST:
        found = float(number)
    if found is None or not math.isfinite(found) or not 0 < found <= _LONGEST:
        raise BadInput(
            f"time_limit = {shown(value)}; allowed is a time above 0 of at most a year: seconds, or a number with "
            "s, m or h",
            hint="e.g. --time-limit 30m (time_limit=1800)",
        )
    return found


def parse_size(value: object, name: str, example: str) -> int:
    """Bytes, or text such as ``8GiB`` and ``500MB``. Raises ``BadInput`` naming the keyword ``name``."""
    found: int | None = None
    if type(value) is str:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]*)\s*", value.lower())
        if match is not None and match[2] in _BYTES:
            found = int(float(match[1]) * _BYTES[match[2]])
    elif isinstance(number := plain_number(value), int):
        found = number
    if found is None or not 0 < found <= _MOST:
        raise BadInput(
            f"{name} = {shown(value)}; allowed is a size above 0: bytes, or a number with a unit (MB, GiB...)",
            hint=f"e.g. {example}",
        )
    return found


def show_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 7200 else f"{seconds / 3600:g} h"


def show_size(size: float) -> str:
    """``8.0 GiB``, ``512.0 MiB``, ``100 bytes``."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} bytes"
