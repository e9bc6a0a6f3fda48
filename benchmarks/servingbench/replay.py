"""What an engine did with the requests of a window, and what a simulation of the same requests needs."""

from __future__ import annotations

import bisect
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from servingbench.asks import Ask, Kind
from tstitch_engines.errors import Busy
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.observer import Observer, Stage, TickInfo
from tstitch_trt.serve.simulate import Report, RequestClass
from tstitch_trt.serve.simulate import Stage as StageTime

__all__ = [
    "MeanCosts",
    "Step",
    "StepTime",
    "Timed",
    "Watch",
    "Window",
    "drive",
    "percentiles",
    "simulated",
    "steps_of",
    "summary",
]


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """A step of ``lanes`` lanes: the mean of ``count``, and of the engine's time beside each."""

    member: str
    guided: bool
    lanes: int
    seconds: float
    beside: float
    count: int


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of one window. ``caps``: of the batches, by member, unguided and guided. ``encode`` and ``decode``:
    seconds of a batch, and of each image in it. ``before`` and ``after``: from the submission until it is encoded, and
    from the last picture until the caller has it: threads that wake up."""

    steps: tuple[StepTime, ...]
    caps: dict[str, tuple[int, int]]
    slots: int
    encode: tuple[float, float]
    decode: tuple[float, float]
    before: float = 0.0
    after: float = 0.0


@dataclass(frozen=True, eq=False)
class Step:
    """The key of a simulated step. One object for each kind of step: compared by identity, which is quick."""

    member: str
    guided: bool
    size: tuple[int, int] = (1, 1)


class MeanCosts:
    """``Costs`` by step times, linear between them in the lanes, with what the engine does beside included."""

    def __init__(self, timed: Timed, steps: Iterable[Step]) -> None:
        self._caps = {step: timed.caps[step.member][step.guided] for step in steps}
        self._tables = {step: _table(timed.steps, step, cap) for step, cap in self._caps.items()}

    def seconds(self, key: Any, lanes: int) -> float:
        table = self._tables[key]
        return table[lanes] if lanes < len(table) else table[-1] * lanes / (len(table) - 1)

    def cap(self, key: Any) -> int:
        return self._caps[key]


def _table(times: Sequence[StepTime], step: Step, cap: int) -> list[float]:
    """By lanes, from 0 to ``cap``."""
    found = {each.lanes: each.seconds + each.beside for each in times if _is(each, step) and each.count >= 3}
    if not found:
        found = {each.lanes: each.seconds + each.beside for each in times if _is(each, step)}
    if not found:  # guided steps are two of the others, and the other way round
        factor = 2.0 if step.guided else 0.5
        return [factor * each for each in _table(times, Step(step.member, not step.guided), cap)]
    lanes = sorted(found)
    seconds = [found[each] for each in lanes]
    table = []
    for count in range(cap + 1):
        index = bisect.bisect_left(lanes, count)
        if index == len(lanes):
            table.append(seconds[-1] * count / lanes[-1])
        elif index == 0:
            table.append(seconds[0])
        else:
            share = (count - lanes[index - 1]) / (lanes[index] - lanes[index - 1])
            table.append(seconds[index - 1] + share * (seconds[index] - seconds[index - 1]))
    return table


def _is(each: StepTime, step: Step) -> bool:
    return (each.member, each.guided) == (step.member, step.guided)


class Watch(Observer):
    """Keeps the times of an engine's steps and stages."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.ticks: list[tuple[float, TickInfo]] = []
        self.stages: dict[Stage, list[tuple[float, float, int]]] = defaultdict(list)
        self.before: list[float] = []
        self.after: list[float] = []
        self._decoded: dict[Handle, float] = {}

    def ticked(self, tick: TickInfo) -> None:
        self.ticks.append((time.monotonic(), tick))

    def stage(self, handle: Handle, name: Stage, began: float, ended: float) -> None:
        self.stages[name].append((began, ended, handle.n))
        if name == "encode":
            self.before.append(began - handle.submitted)
        elif name == "decode":
            self._decoded[handle] = ended

    def finished(self, handle: Handle) -> None:
        if handle in self._decoded:
            self.after.append(time.monotonic() - self._decoded.pop(handle))

    def timed(self, caps: Mapping[str, tuple[int, int]], slots: int) -> Timed:
        """Of all that was kept. What is beside a step: the engine's own mean, and what it does not time itself by the
        median, because the time to the next step is long where there is none to do."""
        by_lanes: dict[tuple[str, bool, int], list[float]] = defaultdict(list)
        for _, tick in self.ticks:
            by_lanes[tick.member, tick.guided, tick.lanes].append(tick.seconds)
        own = np.array([tick.overhead for _, tick in self.ticks])
        apart = [after - before - tick.seconds for (before, _), (after, tick) in itertools.pairwise(self.ticks)]
        beside = float(own.mean() + max(0.0, np.median(apart) - np.median(own)))
        return Timed(
            steps=tuple(
                StepTime(
                    member=member,
                    guided=guided,
                    lanes=lanes,
                    seconds=float(np.mean(all_of)),
                    beside=beside,
                    count=len(all_of),
                )
                for (member, guided, lanes), all_of in sorted(by_lanes.items())
            ),
            caps=dict(caps),
            slots=slots,
            encode=_fitted(self.stages["encode"]),
            decode=_fitted(self.stages["decode"]),
            before=float(np.mean(self.before)),
            after=float(np.mean(self.after)),
        )

    def pace(self, timed: Timed, start: float) -> Callable[[float], float]:
        """How slow the machine was at a time after ``start``, over its mean: it is shared. In bins of a second."""
        usual = {(each.member, each.guided, each.lanes): each.seconds for each in timed.steps}
        real: dict[int, float] = defaultdict(float)
        mean: dict[int, float] = defaultdict(float)
        for ended, tick in self.ticks:
            seconds = usual.get((tick.member, tick.guided, tick.lanes))
            if seconds is not None:
                second = int(ended - tick.seconds - start)
                real[second] += tick.seconds
                mean[second] += seconds
        bins = sorted(second for second in real if mean[second] > 0.05)
        if not bins:
            return lambda at: 1.0
        ratios = [real[second] / mean[second] for second in bins]
        return lambda at: float(np.interp(at, [second + 0.5 for second in bins], ratios))


def _fitted(stages: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Seconds of a batch and of each image of it, at least 0 both. Requests of one batch have equal times."""
    batches: dict[tuple[float, float], int] = defaultdict(int)
    for began, ended, images in stages:
        batches[began, ended] += images
    if not batches:
        return 0.0, 0.0
    seconds = np.array([ended - began for began, ended in batches])
    counts = np.array(list(batches.values()), float)
    each = 0.0
    if counts.std() > 0:
        slope = float(np.cov(counts, seconds, bias=True)[0, 1] / counts.var())
        each = min(max(slope, 0.0), float((seconds / counts).mean()))
    return max(0.0, float(seconds.mean() - each * counts.mean())), each


@dataclass
class Window:
    """``at`` and ``latency`` of every request that was answered, by the time at which it was submitted."""

    at: list[float] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    refused: int = 0
    start: float = 0.0


def _took_down(ends: dict[int, float], number: int, handle: Handle) -> None:
    ends[number] = time.monotonic()


def drive(engine: Engine, asks: Sequence[Ask]) -> Window:
    """Submits at the times of ``asks``, whatever became of those before, and waits for all."""
    window, ends = Window(), dict[int, float]()
    handles: list[tuple[Handle, float]] = []
    start = window.start = time.monotonic()
    for number, ask in enumerate(asks):
        time.sleep(max(0.0, start + ask.at - time.monotonic()))
        now = time.monotonic()
        try:
            handle = engine.submit(labels=list(ask.labels), seeds=list(ask.seeds), **ask.kind.keywords())
        except Busy:
            window.refused += 1
            continue
        handle.add_done_callback(partial(_took_down, ends, number))
        handles.append((handle, now))
        window.at.append(now - start)
        window.kinds.append(ask.kind)
    for handle, _ in handles:
        handle.result(timeout=600)
    window.latency = [ended - now for (_, now), (_, ended) in zip(handles, sorted(ends.items()), strict=True)]
    return window


def steps_of(runtime: Runtime, kind: Kind) -> tuple[tuple[str, bool], ...]:
    """Member and guided, of each step."""
    plan = runtime.plan(steps=kind.steps, fraction=kind.fraction, solver=kind.solver, guidance=kind.guidance)
    return tuple(zip(plan.schedule.names, plan.guided, strict=True))


def simulated(
    timed: Timed, kinds: Mapping[Kind, Sequence[tuple[str, bool]]]
) -> tuple[MeanCosts, dict[Kind, RequestClass], tuple[StageTime, StageTime]]:
    """Costs, the class of each kind, and the stages: encode, decode. ``kinds``: with member and guided of each step."""
    steps: dict[tuple[str, bool], Step] = {}
    classes = {
        kind: RequestClass(
            tuple(steps.setdefault(pair, Step(*pair)) for pair in pairs), str(kind), images=kind.images, encode=1.0
        )
        for kind, pairs in kinds.items()
    }
    stages = (
        StageTime(*timed.encode, most=32),
        StageTime(timed.decode[0] + timed.after, timed.decode[1], most=16),
    )
    return MeanCosts(timed, steps.values()), classes, stages


def percentiles(latency: Iterable[float]) -> dict[str, float]:
    found = np.array(list(latency))
    return {f"p{share}": float(np.percentile(found, share)) for share in (50, 95, 99)} if len(found) else {}


def summary(report: Report) -> dict[str, float]:
    return {"throughput": report.throughput, **percentiles(report.latency), "batch": report.batch}
