"""Which lanes run at the next tick: plain values only, so that the engine and the simulation run the same code.

A lane is one image on its way through its steps. Lanes whose next steps have equal keys form a group, and may run in
one batch. A tick is one batch: some lanes of one group, one step each. Times are seconds on a clock of the caller's.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Costs", "Job", "Lane", "Phases", "Policy", "Scheduler", "Tick", "lane_seconds", "phases_of"]

Key = Hashable
Phases = tuple[tuple[Key, int, int], ...]  # runs of equal keys: the key, the first step, and the one after the last


def phases_of(keys: Sequence[Key]) -> Phases:
    phases: list[tuple[Key, int, int]] = []
    for step, key in enumerate(keys):
        start = phases.pop()[1] if phases and phases[-1][0] == key else step
        phases.append((key, start, step + 1))
    return tuple(phases)


@dataclass(eq=False, slots=True)
class Job:
    """One request. ``priority``: higher goes first. ``deadline``: when its images are wanted, ``None`` for whenever.

    ``lanes``: those of its images that have not ended.
    """

    arrived: float
    priority: int = 0
    deadline: float | None = None
    lanes: list[Lane] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Lane:
    """Image ``image`` of a job. ``keys``: one for each step, of which ``step`` is the next. ``since``: when it became
    ready for that step. ``slot``: its place in the arena, -1 while it waits for one. ``phases``: of ``keys``."""

    job: Job
    image: int
    keys: Sequence[Key]
    step: int
    since: float
    phases: Phases
    slot: int = -1

    @property
    def key(self) -> Key:
        """Of the next step."""
        return self.keys[self.step]

    @property
    def left(self) -> int:
        """Steps that are left."""
        return len(self.keys) - self.step

    def phases_left(self) -> Iterator[tuple[Key, int]]:
        """The keys of the steps that are left and how many steps each has."""
        for key, start, stop in self.phases:
            if stop > self.step:
                yield key, stop - max(start, self.step)


@dataclass(frozen=True)
class Tick:
    """One step of ``lanes``, whose next steps all have ``key``."""

    key: Key
    lanes: tuple[Lane, ...]


class Costs(Protocol):
    """What a batch costs."""

    def seconds(self, key: Key, lanes: int) -> float:
        """Of one step of ``lanes`` lanes."""

    def cap(self, key: Key) -> int:
        """The most lanes that a batch of this key is to have."""


class Policy(Protocol):
    """Chooses among groups. It may keep state of the groups that it is given."""

    def choose(self, groups: Mapping[Key, Sequence[Lane]], costs: Costs, now: float) -> Tick:
        """``groups``: at least one, none of them empty, each in the order of ``since``."""

    def order(self, waiting: Lane, costs: Costs, now: float) -> float:
        """The lane with the smallest gets the next free slot."""


def lane_seconds(lane: Lane, costs: Costs) -> float:
    """What the steps that are left cost, each as its share of a batch as large as ``cap``."""
    total = 0.0
    for key, steps in lane.phases_left():
        size = costs.cap(key)
        total += steps * costs.seconds(key, size) / size
    return total


class Scheduler:
    """Lanes in ``slots`` places, and those that wait for one. Not for two threads at once."""

    def __init__(self, slots: int, policy: Policy, costs: Costs) -> None:
        self.slots = slots
        self.policy = policy
        self.costs = costs
        self._free = list(range(slots))  # a heap: low slots first, which lie side by side
        self._waiting: list[Lane] = []
        self._groups: dict[Key, list[Lane]] = {}

    @property
    def running(self) -> list[Lane]:
        """The lanes that have slots."""
        return [lane for lanes in self._groups.values() for lane in lanes]

    @property
    def waiting(self) -> Sequence[Lane]:
        """The lanes that have none yet."""
        return self._waiting

    @property
    def free(self) -> int:
        """How many slots no lane has."""
        return len(self._free)

    @property
    def idle(self) -> bool:
        return not self._groups and not self._waiting

    def groups(self) -> Mapping[Key, Sequence[Lane]]:
        """The lanes that have slots by the key of their next step."""
        return self._groups

    def add(self, job: Job, images: Iterable[tuple[int, Sequence[Key], int]], now: float) -> list[Lane]:
        """Lanes for a job: for each image its number, the keys of all steps and the first one that runs."""
        phases: dict[int, Phases] = {}  # the images of a request share their keys
        lanes = []
        for image, keys, step in images:
            if id(keys) not in phases:
                phases[id(keys)] = phases_of(keys)
            lanes.append(Lane(job, image, keys, step, now, phases[id(keys)]))
        job.lanes += lanes
        self._waiting += lanes
        return lanes

    def admit(self, now: float) -> list[Lane]:
        """Gives free slots to lanes that wait. Returns those lanes."""
        count = min(len(self._free), len(self._waiting))
        if not count:
            return []
        if count == len(self._waiting):
            chosen = self._waiting
            self._waiting = []
        else:
            chosen = heapq.nsmallest(count, self._waiting, key=lambda lane: self.policy.order(lane, self.costs, now))
            taken = set(map(id, chosen))
            self._waiting = [lane for lane in self._waiting if id(lane) not in taken]
        for lane in chosen:
            lane.slot = heapq.heappop(self._free)
            lane.since = now
            self._groups.setdefault(lane.key, []).append(lane)
        return chosen

    def choose(self, now: float) -> Tick | None:
        """The next batch, or ``None`` where no lane has a slot."""
        return self.policy.choose(self._groups, self.costs, now) if self._groups else None

    def ran(self, tick: Tick, now: float) -> list[Lane]:
        """The tick's lanes have taken their step. Returns those that took their last one; their slots are free.

        Lanes that were dropped meanwhile are left out.
        """
        done, groups = [], self._groups
        lanes = [lane for lane in tick.lanes if lane.slot >= 0]
        if lanes:
            self._leave(tick.key, lanes)
        for lane in lanes:
            lane.step = step = lane.step + 1
            lane.since = now
            if step < len(lane.keys):
                groups.setdefault(lane.keys[step], []).append(lane)
            else:
                done.append(lane)
                self._end(lane)
        return done

    def drop(self, lanes: Iterable[Lane]) -> None:
        """Ends lanes early, whether they have slots or not. A lane that has ended already is left alone."""
        gone = [lane for lane in lanes if lane in lane.job.lanes]
        waiting = {id(lane) for lane in gone if lane.slot < 0}
        if waiting:
            self._waiting = [lane for lane in self._waiting if id(lane) not in waiting]
        for lane in gone:
            if lane.slot >= 0:
                self._leave(lane.key, (lane,))
                self._end(lane)
            else:
                lane.job.lanes.remove(lane)

    def _leave(self, key: Key, lanes: Sequence[Lane]) -> None:
        if len(lanes) == len(self._groups[key]):
            del self._groups[key]
            return
        gone = set(map(id, lanes))
        left = [lane for lane in self._groups[key] if id(lane) not in gone]
        if left:
            self._groups[key] = left
        else:
            del self._groups[key]

    def _end(self, lane: Lane) -> None:
        heapq.heappush(self._free, lane.slot)
        lane.slot = -1
        lane.job.lanes.remove(lane)
