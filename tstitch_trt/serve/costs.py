"""What a batch costs: from a calibration where there is one, corrected by every batch that runs."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tstitch_trt.serve.scheduler import Key

__all__ = ["CostPoint", "MeasuredCosts", "StageTimes"]

Size = tuple[int, int]
Curve = list[tuple[float, float]]  # work (images x area of the latent), rising, and seconds

_UNKNOWN = 0.01  # seconds of a step of one lane of which nothing is known
_KEPT = 1000  # keys: sizes are what clients ask for
_JUMP = 2.0  # one step that takes this much longer than usual says something of the machine, not of the batch


@dataclass(frozen=True)
class CostPoint:
    """One step of ``member`` on ``batch`` images whose latents are ``size`` (height, width) takes ``seconds``."""

    member: str
    guided: bool
    size: Size
    batch: int
    seconds: float


class StepLike(Protocol):
    """What is read of a ``tstitch_trt.runtime.lane_program.StepKey``."""

    @property
    def member(self) -> str: ...
    @property
    def guided(self) -> bool: ...
    @property
    def size(self) -> Size: ...


class _Table:
    """Seconds of one key by batch. ``ratio``: of what ran to ``model``; ``seen``: how many steps it is the mean of."""

    __slots__ = ("batch", "cap", "factor", "model", "ratio", "seen")

    def __init__(self, batch: list[int], model: list[float], cap: int, seen: int) -> None:
        self.batch = batch  # by lanes
        self.model = model
        self.cap = cap
        self.factor = 1.0  # for the batches that never ran
        self.ratio: dict[int, float] = {}
        self.seen: dict[int, int] = dict.fromkeys(batch, seen)


class MeasuredCosts:
    """Seconds of a step by key and lanes, and the caps of batches. ``Costs`` of the scheduler.

    ``points``: measured steps. Between them time is linear in images x area, so that a size without points takes those
    of the nearest one; below the smallest point time is constant, and beyond the largest the time per image is. Without
    any of the member, guided steps are taken for two of its others; else for a guess until they have run.

    ``most``: lanes of a key that fit one batch. ``optimum``: the cap of a key without points, e.g. the batch that its
    engine was tuned for. ``batch``: the lanes that run for a number of lanes, where they are padded. ``tolerance``: the
    cap is the smallest batch whose cost per image is within this of the least. ``weight``: of the newest step in the
    moving averages.

    ``observe`` is for one thread; any may call the others.
    """

    def __init__(
        self,
        points: Iterable[CostPoint] = (),
        *,
        most: Callable[[Key], int],
        optimum: Callable[[Key], int] | None = None,
        batch: Callable[[Key, int], int] | None = None,
        tolerance: float = 0.05,
        weight: float = 0.1,
    ) -> None:
        self._most = most
        self._optimum = optimum or most
        self._batch = batch or (lambda key, lanes: lanes)
        self._tolerance = tolerance
        self._weight = weight
        self._curves: dict[tuple[str, bool], dict[Size, Curve]] = {}
        for point in points:
            sizes = self._curves.setdefault((point.member, point.guided), {})
            bisect.insort(sizes.setdefault(point.size, []), (float(point.batch * _area(point.size)), point.seconds))
        self._tables: dict[Key, _Table] = {}

    def seconds(self, key: Key, lanes: int) -> float:
        """Of one step of ``lanes`` lanes."""
        table = self._tables.get(key) or self._table(key)
        most = len(table.batch) - 1
        batch = table.batch[lanes if lanes < most else most]
        seconds = table.model[batch] * table.ratio.get(batch, table.factor)
        return seconds if lanes <= most else seconds * lanes / most

    def cap(self, key: Key) -> int:
        """The batch at which the cost per image stops falling."""
        return (self._tables.get(key) or self._table(key)).cap

    def observe(self, key: Key, lanes: int, seconds: float) -> None:
        """A step of ``lanes`` lanes took ``seconds``."""
        table = self._tables.get(key) or self._table(key)
        if not 0 < lanes < len(table.batch) or not seconds > 0:
            return
        batch = table.batch[lanes]
        seen, before = table.seen[batch], table.ratio.get(batch, table.factor)
        weight = max(self._weight, 1 / (seen + 1))
        ratio = seconds / table.model[batch]
        change = weight * ((min(ratio, _JUMP * before) if seen * self._weight >= 1 else ratio) - before)
        table.ratio[batch] = before + change
        table.seen[batch] = seen + 1
        table.seen[batch] = seen + 1
        table.factor += max(self._weight, 1 / sum(table.seen.values())) * (table.ratio[batch] - table.factor)

    def _table(self, key: Key) -> _Table:
        most = max(1, self._most(key))
        batch = [0, *(max(lanes, self._batch(key, lanes)) for lanes in range(1, most + 1))]
        curve, scale = self._curve(key)
        if curve is None:
            model = [_UNKNOWN * (1 + lanes) / 2 for lanes in range(max(batch) + 1)]
            table = _Table(batch, model, max(1, min(most, self._optimum(key))), 0)
        else:
            area = _area(_step(key).size)
            model = [scale * _interpolated(curve, lanes * area) for lanes in range(max(batch) + 1)]
            each = [model[batch[lanes]] / lanes for lanes in range(1, most + 1)]
            enough = min(each) * (1 + self._tolerance)
            cap = next(lanes for lanes, cost in enumerate(each, 1) if cost <= enough)
            table = _Table(batch, model, cap, round(1 / self._weight))
        while len(self._tables) >= _KEPT:
            self._tables.pop(next(iter(self._tables)), None)
        return self._tables.setdefault(key, table)

    def _curve(self, key: Key) -> tuple[Curve | None, float]:
        """The points for a key and what their seconds are multiplied by."""
        step = _step(key)
        for guided, scale in ((step.guided, 1.0), (not step.guided, 2.0 if step.guided else 0.5)):
            sizes = self._curves.get((step.member, guided))
            if sizes:
                area = _area(step.size)
                size = step.size if step.size in sizes else min(sizes, key=lambda size: abs(_area(size) - area))
                return sizes[size], scale
        return None, 1.0


class StageTimes:
    """Seconds of what is beside the steps, learned: encoding prompts and pictures, decoding latents."""

    def __init__(self, weight: float = 0.1) -> None:
        self._weight = weight
        self._each: dict[tuple[str, Size], float] = {}  # seconds of an image

    def observe(self, stage: str, size: Size, images: int, seconds: float) -> None:
        """``stage`` took ``seconds`` for a batch of ``images`` images whose latents are ``size``."""
        before = self._each.get((stage, size))
        each = seconds / images
        self._each[stage, size] = each if before is None else before + self._weight * (each - before)

    def seconds(self, stage: str, size: Size, images: int) -> float:
        """By the size that is nearest in area where this one never ran; 0 where none did."""
        each = self._each.get((stage, size))
        if each is None:
            area = _area(size)
            known = [(abs(_area(other) - area), other, time) for (of, other), time in self._each.items() if of == stage]
            if not known:
                return 0.0
            _, other, time = min(known)
            each = time * area / _area(other)
        return each * images


def _step(key: Key) -> StepLike:
    return key  # type: ignore[return-value]  # the scheduler takes any key, these costs take steps


def _area(size: Size) -> int:
    return size[0] * size[1]


def _interpolated(curve: Curve, work: float) -> float:
    index = bisect.bisect_left(curve, (work, 0.0))
    if index == 0:
        return curve[0][1]
    low, first = curve[index - 1]
    if index == len(curve):
        return first * work / low
    high, second = curve[index]
    return first + (second - first) * (work - low) / (high - low)
