"""Jobs on a scheduler whose clock is moved by what its batches cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tstitch_trt.serve.scheduler import Job, Key, Policy, Scheduler, Tick


@dataclass
class TableCosts:
    """A batch of ``lanes`` lanes takes ``once + each * lanes`` seconds; by key."""

    once_each: Mapping[Key, tuple[float, float]]
    caps: Mapping[Key, int] = field(default_factory=dict)

    def seconds(self, key: Key, lanes: int) -> float:
        once, each = self.once_each[key]
        return once + each * lanes

    def cap(self, key: Key) -> int:
        return self.caps.get(key, 8)

    def around(self, scheduler: Scheduler) -> float:
        """One step of all lanes that have slots."""
        return sum(
            self.seconds(key, min(len(lanes), self.cap(key))) * math.ceil(len(lanes) / self.cap(key))
            for key, lanes in scheduler.groups().items()
        )


@dataclass
class Asked:
    """``images`` images, each of ``keys``, at ``at`` seconds."""

    keys: Sequence[Key]
    at: float = 0.0
    images: int = 1
    deadline: float | None = None
    priority: int = 0


@dataclass(frozen=True)
class Ran:
    """A batch from ``began`` to ``ended``. ``waits``: of its lanes, until it began. ``around``: of one round then."""

    tick: Tick
    began: float
    ended: float
    waits: tuple[float, ...]
    around: float


@dataclass
class Device:
    """Runs a scheduler until ``stop`` or until all has ended. ``ended``: when each request did, by its number."""

    scheduler: Scheduler
    costs: TableCosts
    ended: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, costs: TableCosts, policy: Policy, slots: int = 16) -> Device:
        return cls(Scheduler(slots, policy, costs), costs)

    def run(self, asked: Sequence[Asked], *, stop: float = math.inf) -> Iterator[Ran]:
        now, numbers = 0.0, {}
        coming = sorted(enumerate(asked), key=lambda each: -each[1].at)
        while now < stop:
            while coming and coming[-1][1].at <= now:
                number, each = coming.pop()
                job = Job(each.at, each.priority, each.deadline)
                numbers[job] = number
                self.scheduler.add(job, [(image, each.keys, 0) for image in range(each.images)], now)
            self.scheduler.admit(now)
            tick = self.scheduler.choose(now)
            if tick is None:
                if not coming:
                    return
                now = coming[-1][1].at
                continue
            around, waits = self.costs.around(self.scheduler), tuple(now - lane.since for lane in tick.lanes)
            began, now = now, now + self.costs.seconds(tick.key, len(tick.lanes))
            for lane in self.scheduler.ran(tick, now):
                if not lane.job.lanes:
                    self.ended[numbers[lane.job]] = now
            yield Ran(tick, began, now, waits, around)
