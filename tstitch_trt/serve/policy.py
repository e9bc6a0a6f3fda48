"""Which group runs next and which of its lanes. Pure classes over plain values; the simulation runs the same code."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

from tstitch_trt.serve.scheduler import Costs, Key, Lane, Tick, lane_seconds

__all__ = ["DeadlineFirst", "FirstCome", "LargestBatch"]

Groups = Mapping[Key, Sequence[Lane]]


class FirstCome:
    """The group of the request that arrived first."""

    def choose(self, groups: Groups, costs: Costs, now: float) -> Tick:
        key = min(groups, key=lambda key: min(lane.job.arrived for lane in groups[key]))
        return Tick(key, tuple(heapq.nsmallest(costs.cap(key), groups[key], key=lambda lane: lane.job.arrived)))

    def order(self, waiting: Lane, costs: Costs, now: float) -> float:
        return waiting.job.arrived


class LargestBatch:
    """The fullest batch. It starves small groups while large ones last: it is here to be compared with."""

    def choose(self, groups: Groups, costs: Costs, now: float) -> Tick:
        key = max(groups, key=lambda key: (min(len(groups[key]), costs.cap(key)), -groups[key][0].since))
        return Tick(key, tuple(groups[key][: costs.cap(key)]))

    def order(self, waiting: Lane, costs: Costs, now: float) -> float:
        return waiting.job.arrived


class DeadlineFirst:
    """Deadlines first, then deficit round robin among the groups in seconds of device time.

    A round is one step of every lane that has a slot. The first of these that applies chooses the group:

    1. A lane that has waited for its step for more than ``patience`` rounds goes first. So no lane waits for longer
       than ``patience + 1`` rounds and one tick.
    2. Of the lanes with deadlines, in their order, one has no more than a round to spare beside the work that is due by
       then: the group with the earliest deadline. A deadline that its lane could not meet alone counts no more.
    3. The group that is the first to earn its tick. A group earns device time by its lanes, each of which weighs
       1 / its steps that are left: what is soon done is not kept waiting by what is not.

    Lanes beyond a batch's cap go by deadline where it is urgent, else by the time at which they should end: ``stretch``
    times what is left of them after arrival, so that short ones don't wait behind long ones, nor those without end;
    ``ageing`` seconds sooner for each level of priority. Those that wait for slots go by the time at which they should
    start: ``ageing`` seconds after arrival, or what the deadline leaves; sooner by priority as well; and later by what
    the images before it in the same request take, so that a request of many images can't hold up those behind it.
    """

    def __init__(self, *, patience: float = 8.0, ageing: float = 10.0, stretch: float = 8.0) -> None:
        self.patience = patience
        self.ageing = ageing
        self.stretch = stretch
        self._credit: dict[Key, float] = {}  # seconds of device time

    def choose(self, groups: Groups, costs: Costs, now: float) -> Tick:
        caps: dict[Key, int] = {}
        ticks: dict[Key, float] = {}  # seconds of each group's next batch
        weights: dict[Key, float] = {}
        around, longest = 0.0, math.inf
        oldest = next(iter(groups))
        for key, lanes in groups.items():
            count = len(lanes)
            caps[key] = cap = costs.cap(key)
            if len(groups) == 1 and count <= cap:
                self._credit = {}
                return Tick(key, tuple(lanes))
            ticks[key] = seconds = costs.seconds(key, min(count, cap))
            around += seconds * -(-count // cap)
            weights[key] = sum([1 / (len(lane.keys) - lane.step) for lane in lanes])
            if lanes[0].since < longest:
                oldest, longest = key, lanes[0].since
        if now - longest > self.patience * around:
            self._pay(ticks, weights, oldest)
            return Tick(oldest, tuple(groups[oldest][: caps[oldest]]))
        urgent = _urgent(groups, costs, caps, ticks, around, now)
        if urgent:
            key = min(urgent, key=_deadline).key
        else:
            credit = self._credit
            key = min(ticks, key=lambda key: (ticks[key] - credit.get(key, 0.0)) / weights[key])
        self._pay(ticks, weights, key)
        lanes = groups[key]
        if len(lanes) > caps[key]:
            lanes = heapq.nsmallest(caps[key], lanes, key=lambda lane: self._place(lane, costs, urgent))
        return Tick(key, tuple(lanes))

    def order(self, waiting: Lane, costs: Costs, now: float) -> float:
        job = waiting.job
        own = lane_seconds(waiting, costs)
        start = job.arrived + self.ageing + waiting.image * own
        if now < _deadline(waiting) < math.inf:
            start = min(start, _deadline(waiting) - own)
        return start - job.priority * self.ageing

    def _place(self, lane: Lane, costs: Costs, urgent: frozenset[Lane]) -> tuple[float, float]:
        job = lane.job
        wanted = job.arrived + self.stretch * lane_seconds(lane, costs) - job.priority * self.ageing
        return _deadline(lane) if lane in urgent else math.inf, wanted

    def _pay(self, ticks: Mapping[Key, float], weights: Mapping[Key, float], key: Key) -> None:
        """All groups earn the tick's time, and ``key`` spends it. Groups that are gone are forgotten."""
        share, before = ticks[key] / sum(weights.values()), self._credit
        self._credit = {each: before.get(each, 0.0) + share * weight for each, weight in weights.items()}
        self._credit[key] -= ticks[key]


def _deadline(lane: Lane) -> float:
    return math.inf if lane.job.deadline is None else lane.job.deadline


def _urgent(
    groups: Groups, costs: Costs, caps: Mapping[Key, int], ticks: Mapping[Key, float], around: float, now: float
) -> frozenset[Lane]:
    """The lanes that are due by the first deadline that leaves no more than a round to spare; none where all do."""
    due = [(lane.job.deadline, lane) for lanes in groups.values() for lane in lanes if lane.job.deadline is not None]
    if not due:
        return frozenset()
    due.sort(key=itemgetter(0))
    needed = 0.0  # device time until all of them have ended, where their steps share batches
    possible = []
    phases: dict[Key, _Phase] = {}
    for deadline, lane in due:
        alone, left = 0.0, []
        for key, steps in lane.phases_left():
            phase = phases.get(key)
            if phase is None:
                one = costs.seconds(key, 1)
                phase = phases[key] = _Phase(one, ticks.get(key, one), caps.get(key) or costs.cap(key))
            alone += steps * phase.one
            left.append((phase, steps))
        if now + alone > deadline:
            continue
        possible.append(lane)
        for phase, steps in left:
            needed += phase.add(steps)
        if now + needed + around > deadline:
            return frozenset(possible)
    return frozenset()


class _Phase:
    """The batches that lanes need for their steps of one key."""

    __slots__ = ("batches", "cap", "longest", "one", "tick", "total")

    def __init__(self, one: float, tick: float, cap: int) -> None:
        self.one = one  # seconds of a batch of one lane
        self.tick = tick  # and of one as it would run now
        self.cap = cap
        self.longest = self.total = self.batches = 0

    def add(self, steps: int) -> float:
        """A further lane with ``steps`` steps. Returns the seconds of the batches that it adds."""
        self.total += steps
        if steps > self.longest:
            self.longest = steps
        before = self.batches
        self.batches = max(self.longest, -(-self.total // self.cap))
        return (self.batches - before) * self.tick
