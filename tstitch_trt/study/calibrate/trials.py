"""The trajectories that a calibration runs: those that it is fitted on, and random ones that check it."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Final

from tstitch_trt.request.synthetic import synthetic_request
from tstitch_trt.study.budget.predict import Kinds, kinds_of
from tstitch_trt.study.calibrate.drift import Slot
from tstitch_trt.study.divergence.orders import counted

if TYPE_CHECKING:
    from tstitch_trt.plan.plan import Plan
    from tstitch_trt.runtime.chooser import ChosenSchedule
    from tstitch_trt.runtime.runtime import Runtime

__all__ = [
    "SHORT",
    "Bucket",
    "Trial",
    "alternating",
    "check_trials",
    "fit_trials",
    "kind_trials",
    "slots_of",
    "warm_up",
]

BLOCK_MS: Final = 200.0  # about the length of a trajectory of one member alone
SLOT_MS: Final = 50.0  # shorter trajectories run a few times in a row
MOST_RUNS: Final = 8  # in a slot
MOST_SLOTS: Final = 12  # of a trial in a round
LONGER: Final = 1.5  # a round may take so many times as long as one slot of each trial
MOST_STEPS: Final = 50
SHORT: Final = 2


@dataclass(frozen=True)
class Bucket:
    """Images of one chunk, and height and width of their latents. ``guided``: whether guided steps fit."""

    batch: int
    size: tuple[int, int]
    guided: bool


@dataclass(eq=False)
class Trial:
    """A trajectory that is run repeatedly. ``settings``: keywords of ``make_plan``.

    ``times``: milliseconds of all runs. ``firsts``: of the first run of each slot, which is like a single request.
    ``slots``: the median of each slot and when it was. ``rough_ms``: of one run, from a slot that was not kept.
    """

    bucket: Bucket
    settings: Mapping[str, Any]
    plan: Plan
    keywords: dict[str, Any]
    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    rough_ms: float = 0.0

    @staticmethod
    def of(runtime: Runtime, bucket: Bucket, **settings: Any) -> Trial:
        manifest, plan = runtime.manifest, runtime.plan(**settings)
        keywords: dict[str, Any] = dict(
            synthetic_request(manifest, runtime.backend_name, plan, bucket.batch, size=bucket.size)
        )
        if bucket.size != runtime.limits.native:
            height, width = (side * manifest.decoder.factor for side in bucket.size)
            keywords |= {"height": height, "width": width}
        return Trial(bucket, settings, plan, keywords)

    @property
    def kinds(self) -> Kinds:
        return kinds_of(self.plan)

    @property
    def alone(self) -> bool:
        """Whether one kind of step runs all the way."""
        return len(set(self.kinds)) == 1

    def run_slot(self, runtime: Runtime, *, keep: bool) -> None:
        """Runs it once, or a few times where that takes less than ``SLOT_MS``."""
        start = time.perf_counter()
        taken = [self.run(runtime)]
        taken += [self.run(runtime) for _ in range(runs_of(taken[0]) - 1)]
        if keep:
            self.times += taken
            self.firsts.append(taken[0])
            self.slots.append(Slot(start, time.perf_counter(), statistics.median(taken)))
        else:
            self.rough_ms = min(taken)

    @property
    def slot_ms(self) -> float:
        """Milliseconds that a slot takes, roughly."""
        return self.rough_ms * runs_of(self.rough_ms)

    def run(self, runtime: Runtime) -> float:
        """Milliseconds of one run."""
        return runtime.sample(**self.keywords, seed=0, decode=False, **self.settings).total_ms


def runs_of(ms: float) -> int:
    """How often a trajectory of so many milliseconds runs in a slot."""
    return max(1, min(MOST_RUNS, int(SLOT_MS / ms)))


def slots_of(slot_ms: Sequence[float]) -> list[int]:
    """How many slots each trial has in a round, by the milliseconds that one takes.

    All run about equally long, since a shared machine changes its speed every few seconds: up to ``MOST_SLOTS`` slots,
    while the round gets at most ``LONGER`` times as long.
    """
    slots, left = [1] * len(slot_ms), (LONGER - 1) * sum(slot_ms)
    while True:
        growing = [index for index, count in enumerate(slots) if count < MOST_SLOTS]
        least = min(growing, key=lambda index: slots[index] * slot_ms[index], default=None)
        if least is None or slot_ms[least] > left:
            return slots
        slots[least] += 1
        left -= slot_ms[least]


def _scales(runtime: Runtime, bucket: Bucket) -> list[float]:
    """The guidance scales of unguided and, where there are such steps, of guided ones. Costs do not depend on it."""
    usual = runtime.manifest.defaults.guidance
    guided = bucket.guided and runtime.manifest.conditioning.guidable
    return [1.0, usual if usual != 1 else 2.0] if guided else [1.0]


def _longest(runtime: Runtime) -> int:
    return min(MOST_STEPS, max(runtime.manifest.defaults.steps, 4))


def kind_trials(runtime: Runtime, bucket: Bucket, steps: Mapping[tuple[str, bool], int] | int) -> list[Trial]:
    """Each member alone, unguided and, where it has such steps, guided. ``steps``: the number of steps of each."""
    found: dict[tuple[str, bool], Trial] = {}
    for name in runtime.members:
        for scale in _scales(runtime, bucket):
            guided = any(runtime.plan(schedule=name, steps=1, guidance=scale).guided)
            if (name, guided) not in found:
                count = steps if isinstance(steps, int) else steps[name, guided]
                found[name, guided] = Trial.of(runtime, bucket, schedule=name, steps=count, guidance=scale)
    return list(found.values())


def fit_trials(runtime: Runtime, bucket: Bucket, rough: Iterable[Trial]) -> list[Trial]:
    """Each kind of step alone, long and short, and members that alternate: enough to separate step costs, overhead and
    switch cost.

    ``rough``: ``kind_trials`` of the bucket with ``SHORT`` steps, which were run: their times choose the lengths.
    """
    cost = {trial.kinds[0]: min(trial.times) / trial.plan.steps for trial in rough}
    most = _longest(runtime)
    lengths = {kind: min(most, max(4, math.ceil(BLOCK_MS / ms))) for kind, ms in cost.items()}
    found = [*kind_trials(runtime, bucket, lengths), *kind_trials(runtime, bucket, SHORT)]
    if len(runtime.members) < 2:
        return found
    for scale in _scales(runtime, bucket):
        round_ms = sum(cost[kind] for kind in cost if kind[1] == (scale != 1)) or sum(cost.values())
        count = min(most, max(4, math.ceil(BLOCK_MS / round_ms) * len(runtime.members)))
        found.append(alternating(runtime, bucket, runtime.members, count, guidance=scale))
    return found


def alternating(runtime: Runtime, bucket: Bucket, names: Sequence[str], steps: int, **settings: Any) -> Trial:
    """A trial that changes the member at each step."""
    rows = runtime.plan(schedule=names[0], steps=steps).steps  # pndm has one more than steps
    return Trial.of(runtime, bucket, schedule=list(islice(cycle(names), rows)), steps=steps, **settings)


def check_trials(runtime: Runtime, buckets: Sequence[Bucket], count: int, *, seed: int) -> list[Trial]:
    """``count`` random trajectories: bucket, steps, up to four segments of random members and lengths, guidance.

    A third of the guided ones is guided in a random interval only.
    """
    rng = random.Random(seed)  # noqa: S311 - schedules, not secrets
    found = []
    for _ in range(count):
        bucket = rng.choice(buckets)
        steps = rng.randint(4, _longest(runtime))
        rows = runtime.plan(schedule=runtime.members[0], steps=steps).steps
        cuts = sorted(rng.sample(range(1, rows), min(rng.randint(0, 3), rows - 1)))
        counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, rows], strict=True)]
        names = [rng.choice(runtime.members) for _ in counts]
        schedule = counted([name for name, length in zip(names, counts, strict=True) for _ in range(length)])
        settings: dict[str, Any] = {"guidance": rng.choice(_scales(runtime, bucket))}
        embedded = any(member.guidance_embedding for member in runtime.manifest.members.values())
        if settings["guidance"] != 1 and not embedded and rng.random() < 1 / 3:
            start, stop = sorted(rng.sample(range(rows + 1), 2))
            settings["guidance_interval"] = (start, stop)
        found.append(Trial.of(runtime, bucket, schedule=schedule, steps=steps, **settings))
    return found


def warm_up(runtime: Runtime, budget: ChosenSchedule) -> None:
    """Runs a step of each kind that ``budget`` chose, once: a network's first run at a new size takes longer."""
    plan = runtime.plan(**budget.settings)
    guided = any(plan.guided)
    names = list(dict.fromkeys(plan.schedule.names))
    for images in dict.fromkeys(runtime.splitting.chunks(budget.images, guided=guided)):
        bucket = Bucket(images, budget.size, guided)
        alternating(runtime, bucket, names, len(names), guidance=budget.settings.get("guidance")).run(runtime)
