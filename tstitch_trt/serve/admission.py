"""Whether a request may come in: a bounded queue, and the time that it would take. Decides on plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tstitch_trt.serve.costs import StageTimes
from tstitch_trt.serve.scheduler import Costs, Key, Lane, Phases, Scheduler

__all__ = ["Admission", "Admitted", "Booked", "Cheaper", "Load", "Offer", "Refused", "load_of"]

_LEARN = 0.1  # of the margin, for one budget that was not met
_MOST_MARGIN = 5.0


@dataclass(frozen=True)
class Cheaper:
    """How far a request with a latency budget may be made cheaper under load: the largest share of the steps that the
    small member takes, and the fewest steps."""

    max_fraction: float = 1.0
    min_steps: int = 1


@dataclass(frozen=True)
class Offer:
    """One way to draw a request: ``phases`` of each image; ``bytes`` that the request holds on the host while it waits.

    ``fraction``: the share of the steps that the small member takes. ``encoded``: whether text or pictures are encoded
    for it, ``decoded``: whether its latents are.
    """

    images: int
    bytes: int
    phases: Phases
    size: tuple[int, int]
    fraction: float | None = None
    encoded: bool = False
    decoded: bool = True

    @property
    def steps(self) -> int:
        return self.phases[-1][2] - self.phases[0][1]


@dataclass(frozen=True)
class Booked:
    """What is left of a request. ``waiting``: its images without a slot. ``seconds`` of device time."""

    waiting: int
    seconds: float
    deadline: float | None = None


@dataclass(frozen=True)
class Load:
    """What is there already. ``running``: the device seconds that each lane with a slot still needs; ``waiting``: those
    of the ``images`` without one, whose requests hold ``bytes``. ``due``: the requests with deadlines. ``around``:
    seconds of one step of all that runs."""

    slots: int
    running: tuple[float, ...] = ()
    waiting: float = 0.0
    images: int = 0
    bytes: int = 0
    due: tuple[Booked, ...] = ()
    around: float = 0.0

    @property
    def seconds(self) -> float:
        """Device time until all is done."""
        return sum(self.running) + self.waiting

    @property
    def free(self) -> int:
        return self.slots - len(self.running)


@dataclass(frozen=True)
class Admitted:
    """``offer``: the number of the one that was taken. ``seconds``: until its images are there, predicted."""

    offer: int
    seconds: float


@dataclass(frozen=True)
class Refused:
    """``retry_after``: seconds after which it may be admitted, infinite where no time helps. ``seconds``: how long it
    would have taken."""

    why: Literal["images", "bytes", "budget"]
    retry_after: float
    seconds: float


def load_of(scheduler: Scheduler, *, bytes: int = 0, before: Iterable[Booked] = ()) -> Load:  # noqa: A002 - the field's
    """``before``: requests that are not with the scheduler yet, e.g. those that are being encoded."""
    costs = scheduler.costs
    share: dict[Key, float] = {}  # of a full batch

    def seconds(lane: Lane) -> float:
        found = 0.0
        for key, steps in lane.phases_left():
            if key not in share:
                cap = costs.cap(key)
                share[key] = costs.seconds(key, cap) / cap
            found += steps * share[key]
        return found

    running = scheduler.running
    early = list(before)
    due = [each for each in early if each.deadline is not None]
    for job in {lane.job for lanes in (running, scheduler.waiting) for lane in lanes if lane.job.deadline is not None}:
        waiting = sum(lane.slot < 0 for lane in job.lanes)
        due.append(Booked(waiting, sum(map(seconds, job.lanes)), job.deadline))
    around = 0.0
    for key, lanes in scheduler.groups().items():
        cap = costs.cap(key)
        around += costs.seconds(key, min(len(lanes), cap)) * -(-len(lanes) // cap)
    return Load(
        scheduler.slots,
        tuple(map(seconds, running)),
        sum(map(seconds, scheduler.waiting)) + sum(each.seconds for each in early),
        len(scheduler.waiting) + sum(each.waiting for each in early),
        bytes,
        tuple(sorted(due, key=_deadline)),
        around,
    )


class Admission:
    """``max_images`` and ``max_bytes``: of what waits. ``cheaper``: ``None`` makes nothing cheaper. ``margin``: what
    device time is multiplied by before it is compared with a latency budget. It grows with budgets that were not met
    and shrinks with those that were, not below what it was first, so that about ``missed`` of them are not met."""

    def __init__(
        self,
        max_images: int,
        max_bytes: int,
        costs: Costs,
        stages: StageTimes,
        *,
        cheaper: Cheaper | None = None,
        margin: float = 1.1,
        missed: float = 0.01,
    ) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.costs = costs
        self.stages = stages
        self.cheaper = cheaper
        self.margin = self._least = margin
        self._missed = missed

    def ended(self, *, met: bool) -> None:
        """A request that had a latency budget was answered. Not for two threads at once."""
        change = -_LEARN * self._missed if met else _LEARN * (1 - self._missed)
        self.margin = min(_MOST_MARGIN, max(self._least, self.margin * (1 + change)))

    def admit(
        self, offers: Sequence[Offer], load: Load, now: float, *, budget: float | None = None
    ) -> Admitted | Refused:
        """``offers``: as the request was made, then cheaper ones in the order in which they are to be tried.

        ``budget``: seconds from now. A request with one is admitted only if it is met, and no earlier promise broken.
        """
        full = self._full(offers[0], load)
        if full is not None:
            return full
        if budget is None:
            return Admitted(0, self._shared(offers[0], load))
        allowed = [number for number, offer in enumerate(offers) if not number or self._allowed(offer)]
        found = [self._promised(offers[number], load, now, budget) for number in allowed]
        for number, seconds in zip(allowed, found, strict=True):
            if seconds <= budget:
                return Admitted(number, seconds)
        idle = Load(load.slots)
        helps = any(self._promised(offers[number], idle, now, budget) <= budget for number in allowed)
        return Refused("budget", min(min(found) - budget, load.seconds) if helps else math.inf, min(found))

    def room(self, offer: Offer, images: int, bytes: int, free: int) -> bool:  # noqa: A002 - the field's
        """Whether the queue has room beside ``images`` and ``bytes`` that wait for ``free`` slots."""
        return images + offer.images - free <= self.max_images and bytes + offer.bytes <= self.max_bytes

    def _full(self, offer: Offer, load: Load) -> Refused | None:
        """Refused where there is no ``room``: until as many have left as it needs, by the average of those there."""
        if self.room(offer, load.images, load.bytes, load.free):
            return None
        images = load.images + offer.images - load.free - self.max_images
        size = load.bytes + offer.bytes - self.max_bytes
        seconds = self._shared(offer, load)
        if offer.images > load.slots + self.max_images or offer.bytes > self.max_bytes:
            return Refused("images" if offer.bytes <= self.max_bytes else "bytes", math.inf, seconds)
        by_images = max(0, images) / max(1, load.images + len(load.running))
        by_bytes = max(0, size) / max(1, load.bytes)
        return Refused("images" if images > 0 else "bytes", max(by_images, by_bytes) * load.seconds, seconds)

    def _allowed(self, offer: Offer) -> bool:
        if self.cheaper is None:
            return False
        return (offer.fraction or 0.0) <= self.cheaper.max_fraction and offer.steps >= self.cheaper.min_steps

    def _steps(self, offer: Offer) -> tuple[float, float]:
        """Device seconds of one image: its share of full batches, and in batches of this request's images alone."""
        shared = alone = 0.0
        for key, start, stop in offer.phases:
            cap = self.costs.cap(key)
            shared += (stop - start) * self.costs.seconds(key, cap) / cap
            alone += (stop - start) * self.costs.seconds(key, min(offer.images, cap)) * -(-offer.images // cap)
        return shared, alone

    def _beside(self, offer: Offer) -> float:
        """Of the stages beside the steps."""
        encoded = self.stages.seconds("encode", offer.size, offer.images) if offer.encoded else 0.0
        return encoded + (self.stages.seconds("decode", offer.size, offer.images) if offer.decoded else 0.0)

    def _shared(self, offer: Offer, load: Load) -> float:
        """Until the images are there where all lanes share the device alike: none that runs takes more of it than these
        images do meanwhile, and those that wait go first."""
        each, alone = self._steps(offer)
        running = sum(min(seconds, each) for seconds in load.running)
        return self._beside(offer) + max(running + load.waiting + offer.images * each, alone)

    def _promised(self, offer: Offer, load: Load, now: float, budget: float) -> float:
        """Until the images are there where the earliest deadline goes first, after a slot is free for each of them.

        Above ``budget`` too where a later deadline that was promised would be missed.
        """
        each, alone = self._steps(offer)
        needed = self.margin * max(offer.images * each, alone)
        before = [other for other in load.due if _deadline(other) <= now + budget]
        wanted = sum(other.waiting for other in before) + offer.images - load.free
        ended = sorted(load.running)
        slot = 0.0
        if wanted > len(ended):
            slot = load.seconds
        elif wanted > 0:
            slot = sum(min(seconds, ended[wanted - 1]) for seconds in ended)
        slot, first = self.margin * slot, self.margin * sum(other.seconds for other in before)
        late, due = 0.0, first
        for other in load.due[len(before) :]:
            due += self.margin * other.seconds
            spare = _deadline(other) - now - due - load.around
            if 0 <= spare < needed:
                late = max(late, needed - spare)
        taken = self.margin * self._beside(offer) + slot + first + needed + load.around
        return max(taken, budget + late if late else 0.0)


def _deadline(booked: Booked) -> float:
    return math.inf if booked.deadline is None else booked.deadline
