"""What is told of a window: latencies with what never came as infinite, goodput, and the load that a limit allows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput

__all__ = [
    "ATTAINED",
    "Counters",
    "Limit",
    "Served",
    "Sustained",
    "Usage",
    "latencies",
    "percentile",
    "strain",
    "sustained",
    "within",
]

ATTAINED: Final = 0.95  # the share of requests that a limit is to be met by


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """A latency limit: ``times`` what the request takes alone on an idle server, but at least ``seconds``."""

    times: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.times:g}x"] if self.times else []
        return "+".join(parts + ([f"{1e3 * self.seconds:g}ms"] if self.seconds else []))

    def of(self, alone: float) -> float:
        """Seconds. ``alone``: what the request takes on an idle server."""
        return max(self.times * alone, self.seconds)

    @staticmethod
    def parse(text: str) -> Limit:
        """``"4x"``, ``"500ms"``, ``"4x+200ms"``. Raises ``BadInput``."""
        parts = text.split("+")
        matches = [re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(x|ms)", part) for part in parts]
        values = {match[2]: float(match[1]) for match in matches if match is not None}
        if len(values) != len(parts) or not any(values.values()):
            raise BadInput(
                f"--limits {shown(text)}; allowed are limits such as 4x, 500ms and 4x+200ms",
                hint="e.g. --limits 4x+200ms,1000ms",
            )
        return Limit(times=values.get("x", 0.0), seconds=values.get("ms", 0.0) / 1e3)


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a window. ``at``: when it was to be sent. ``latency``: seconds from then to its last byte,
    ``None`` for one without pictures, whose ``error`` says why."""

    at: float
    images: int
    alone: float
    latency: float | None = None
    error: str | None = None


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a contender has done so far: calls of members (one a step and batch) and the lanes in them.

    Of ours only: ``overhead``, seconds beside the steps; calls of the last member and the seconds in them.
    """

    calls: int = 0
    lanes: int = 0
    overhead: float = 0.0
    large_calls: int = 0
    large_seconds: float = 0.0

    def since(self, before: Counters) -> Counters:
        return Counters(**{n: getattr(self, n) - getattr(before, n) for n in self.__struct_fields__})


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """CPU seconds of a front's processes so far, and the sum of their largest resident sizes in bytes."""

    cpu_seconds: float
    peak_bytes: int


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of all are at or below (nearest rank): an infinite one stays so.

    NaN for none at all.
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)] if ordered else math.nan


def latencies(served: Iterable[Served]) -> list[float]:
    """Seconds; infinite for what was refused, failed or never came."""
    return [math.inf if one.latency is None else one.latency for one in served]


def within(served: Sequence[Served], limit: Limit) -> float:
    """The share of requests that were answered within the limit."""
    good = sum(one.latency is not None and one.latency <= limit.of(one.alone) for one in served)
    return good / len(served) if served else math.nan


def strain(served: Sequence[Served], limit: Limit) -> float:
    """The 95th percentile of latency over the request's own limit: up to 1 the limit holds."""
    found = [math.inf if one.latency is None else one.latency / limit.of(one.alone) for one in served]
    return percentile(found, ATTAINED)


class Sustained(msgspec.Struct, frozen=True, kw_only=True):
    """The largest rate at which a limit holds. ``bound``: ``at least`` and ``below`` where that is outside of what was
    measured."""

    rate: float
    bound: Literal["", "at least", "below"] = ""

    def __str__(self) -> str:
        return f"{self.bound} {self.rate:.3g}".strip()

    def over(self, other: Sustained) -> str:
        """The ratio of the two rates and its bound; ``about`` where that is not known."""
        opposite: dict[str, str] = {"at least": "below", "below": "at least", "": ""}
        bounds = {self.bound, opposite[other.bound]} - {""}
        bound = "about" if len(bounds) > 1 else bounds.pop() if bounds else ""
        return f"{bound} {self.rate / other.rate:.2f}".strip()


def sustained(points: Mapping[float, float]) -> Sustained:
    """``points``: strain by offered rate. Between the last rate that holds and the first that does not, where the
    strain is 1: interpolated in the strain's logarithm."""
    before: tuple[float, float] | None = None
    for rate, found in sorted(points.items()):
        if found <= 1:
            before = (rate, found)
        elif before is None:
            return Sustained(rate=rate, bound="below")
        elif math.isinf(found):
            return Sustained(rate=before[0])
        else:
            low, high = math.log(max(before[1], 1e-9)), math.log(found)
            return Sustained(rate=before[0] - (rate - before[0]) * low / (high - low))
    assert before is not None, "at least one load was measured"
    return Sustained(rate=before[0], bound="at least")
