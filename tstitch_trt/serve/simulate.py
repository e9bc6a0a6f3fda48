"""Serving without devices: the scheduler, policy, costs and admission of the engine on a clock that their events move.

Up to thousands of devices behind one router. What takes time: the front, the encoder and the decoder of each device
(each one batch at a time, beside the steps), and the steps. Sending pictures takes none.
"""

from __future__ import annotations

import heapq
import math
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tstitch_trt.serve.admission import Admission, Admitted, Booked, Offer, load_of
from tstitch_trt.serve.costs import StageTimes
from tstitch_trt.serve.policy import DeadlineFirst
from tstitch_trt.serve.scheduler import Costs, Job, Key, Lane, Policy, Scheduler, Tick, phases_of

__all__ = ["Failure", "Report", "RequestClass", "Setup", "Stage", "bursts", "poisson", "simulate"]

Arrival = tuple[float, int]  # seconds, number of a request class
Router = Literal["least_work", "two_choices", "round_robin"]


@dataclass(frozen=True)
class RequestClass:
    """Requests of one kind. ``keys``: of each image's steps. ``bytes``: that each image holds on the host while it has
    no slot. ``encode``, ``decode``: images' worth of those stages that it takes. ``budget``: seconds within which the
    request is wanted, ``None`` for whenever. ``share``: of the arrivals."""

    keys: tuple[Key, ...]
    name: str = ""
    images: int = 1
    bytes: int = 0
    encode: float = 0.0
    decode: float = 1.0
    budget: float | None = None
    priority: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A batch of at most ``most`` images takes ``once + each * images`` seconds."""

    once: float = 0.0
    each: float = 0.0
    most: int = 8


@dataclass(frozen=True)
class Failure:
    """``device`` is lost at ``at`` and back, empty, at ``back``."""

    device: int
    at: float
    back: float = math.inf


@dataclass(frozen=True)
class Setup:
    """What is simulated.

    ``arrivals``: in order of time. ``costs``: of the steps; ``overhead``: seconds beside each batch. ``speeds``: what
    the seconds of each device are multiplied by, in turn; ``pace``: and those of all, by the time. ``jitter``: the
    standard deviation of the logarithm of a batch's time. ``refresh``: seconds between two looks of a front at the
    devices' work; 0 is always up to date. ``front``: seconds that one of ``fronts`` processes works for a request.
    ``retries``: how often a client that was refused comes back after the time it was told. ``detect``: seconds until a
    failure is known; what the device had is then sent to others, once. ``limit``: of latency, for the goodput.
    """

    classes: Sequence[RequestClass]
    arrivals: Iterable[Arrival]
    costs: Costs
    devices: int = 1
    slots: int = 16
    policy: Callable[[], Policy] = DeadlineFirst
    router: Router = "least_work"
    max_images: int = 256
    max_bytes: int = 2 << 30
    encode: Stage = Stage()
    decode: Stage = Stage()
    overhead: float = 0.0
    speeds: Sequence[float] = (1.0,)
    pace: Callable[[float], float] | None = None
    jitter: float = 0.0
    refresh: float = 0.0
    front: float = 0.0
    fronts: int = 1
    retries: int = 0
    failures: Sequence[Failure] = ()
    detect: float = 1.0
    limit: float = math.inf
    seed: int = 0
    watch: Callable[[int, Tick, float], None] | None = None  # device, batch, when it begins


@dataclass
class Report:
    """What happened. Times in seconds. ``latency``: of each request that was answered, from its first arrival, in the
    order of the answers; ``kind``: their classes. ``missed``: answered after their budget. ``busy``: of each device,
    with batches of steps. ``fill``: lanes that ran over those that the caps allow. ``events``: that were handled."""

    requests: int = 0
    refused: int = 0
    failed: int = 0
    retried: int = 0
    missed: int = 0
    images: int = 0
    seconds: float = 0.0
    ticks: int = 0
    lanes: int = 0
    room: int = 0
    events: int = 0
    most_waiting: int = 0
    good: int = 0
    latency: array[float] = field(default_factory=lambda: array("d"))
    kind: array[int] = field(default_factory=lambda: array("i"))
    busy: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def done(self) -> int:
        return len(self.latency)

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def goodput(self) -> float:
        """Requests per second that were answered within the limit and their budget."""
        return self.good / self.seconds if self.seconds else 0.0

    @property
    def fill(self) -> float:
        return self.lanes / self.room if self.room else 0.0

    @property
    def batch(self) -> float:
        """Lanes of a batch, on average."""
        return self.lanes / self.ticks if self.ticks else 0.0

    def percentile(self, share: float, kind: int | None = None) -> float:
        """Of the latency; ``kind``: of one class. NaN where nothing was answered."""
        found = np.frombuffer(self.latency) if self.latency else np.zeros(0)
        if kind is not None and self.kind:
            found = found[np.frombuffer(self.kind, np.intc) == kind]
        return float(np.percentile(found, share)) if len(found) else math.nan


def poisson(rate: float, classes: Sequence[RequestClass], *, seed: int = 0) -> Iterator[Arrival]:
    """``rate`` requests a second on average, without end: take some with ``itertools.islice``."""
    rng = random.Random(seed)  # noqa: S311 - arrivals, not secrets
    numbers, shares, now = range(len(classes)), [each.share for each in classes], 0.0
    while True:
        for number in rng.choices(numbers, shares, k=1000):
            now += rng.expovariate(rate)
            yield now, number


def bursts(
    rate: float, classes: Sequence[RequestClass], *, period: float, busy: float, seed: int = 0
) -> Iterator[Arrival]:
    """``poisson``, all of it in the first ``busy`` share of each ``period``."""
    for time, number in poisson(rate, classes, seed=seed):
        whole, part = divmod(time, period)
        yield whole * period + part * busy, number


def simulate(setup: Setup) -> Report:
    return _Simulation(setup).run()


class _Request(Job):
    __slots__ = ("kind", "left", "moved", "tries")

    def __init__(self, arrived: float, kind: int, priority: int, deadline: float | None, images: int) -> None:
        super().__init__(arrived, priority, deadline)
        self.kind = kind
        self.left = images  # that are not decoded
        self.tries = 0
        self.moved = False


class _Device:
    """Queues before the encoder and the decoder, and lanes. ``life``: events of an earlier one are void."""

    def __init__(self, setup: Setup, number: int) -> None:
        self.setup = setup
        self.number = number
        self.speed = setup.speeds[number % len(setup.speeds)]
        self.life = 0
        self.down = 0  # failures that last
        self.requests: dict[_Request, None] = {}  # all that are here
        self.stranded: list[_Request] = []  # sent here while it was down
        self.empty()

    def empty(self) -> None:
        self.scheduler = Scheduler(self.setup.slots, self.setup.policy(), self.setup.costs)
        self.to_encode: deque[_Request] = deque()
        self.encoding: list[_Request] = []
        self.to_decode: deque[_Request] = deque()  # one entry for each image
        self.decoding: list[_Request] = []
        self.ticking = False
        self.early = 0  # images that have no lanes yet
        self.bytes = 0  # of images without a slot


class _Simulation:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.classes = setup.classes
        self.costs = setup.costs
        self.report = Report()
        self.devices = [_Device(setup, number) for number in range(setup.devices)]
        self.work = np.zeros(setup.devices)  # device seconds that are left
        self.seen = np.zeros((setup.fronts, setup.devices))  # as each front knows it
        self.looked = [-math.inf] * setup.fronts
        self.free = [(0.0, front) for front in range(setup.fronts)]  # a heap: when each front is
        self.busy = [0.0] * setup.devices
        self.turn = 0
        self.rng = random.Random(setup.seed)  # noqa: S311 - a simulation, not secrets
        self.events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self.order = 0
        self.shares: dict[Key, float] = {}
        self.offers = [
            Offer(
                each.images,
                each.bytes * each.images,
                phases_of(each.keys),
                (1, 1),
                None,
                each.encode > 0,
                each.decode > 0,
            )
            for each in setup.classes
        ]
        self.works = [sum(map(self.share, each.keys)) * each.images for each in setup.classes]
        stages = StageTimes()
        for name, stage in (("encode", setup.encode), ("decode", setup.decode)):
            stages.observe(name, (1, 1), stage.most, stage.once + stage.each * stage.most)
        self.admissions = [
            Admission(setup.max_images, setup.max_bytes, setup.costs, stages) for _ in range(setup.devices)
        ]
        for failure in setup.failures:
            self.at(failure.at, self.fail, self.devices[failure.device])
            if failure.back < math.inf:
                self.at(failure.back, self.come_back, self.devices[failure.device])

    def share(self, key: Key) -> float:
        """Seconds of one lane's step in a full batch."""
        if key not in self.shares:
            cap = self.costs.cap(key)
            self.shares[key] = self.costs.seconds(key, cap) / cap
        return self.shares[key]

    def at(self, time: float, call: Callable[..., None], *given: object) -> None:
        self.order += 1
        heapq.heappush(self.events, (time, self.order, call, given))

    def run(self) -> Report:
        arrivals, events, report, first = iter(self.setup.arrivals), self.events, self.report, math.nan
        coming = next(arrivals, None)
        while coming is not None or events:
            report.events += 1
            if coming is not None and (not events or coming[0] <= events[0][0]):
                now, kind = coming
                first = now if not report.requests else first
                self.arrive(now, kind)
                coming = next(arrivals, None)
            else:
                now, _, call, given = heapq.heappop(events)
                call(now, *given)
        report.seconds = max(report.seconds - first, 0.0) if report.requests else 0.0
        report.busy = np.array(self.busy)
        report.failed += sum(len(device.stranded) for device in self.devices)
        return report

    def arrive(self, now: float, kind: int) -> None:
        self.report.requests += 1
        each = self.classes[kind]
        due = None if each.budget is None else now + each.budget
        request = _Request(now, kind, each.priority, due, each.images)
        free, front = self.free[0]
        free = max(now, free) + self.setup.front
        heapq.heapreplace(self.free, (free, front))
        if self.setup.front:
            self.at(free, self.dispatch, request, front)
        else:
            self.dispatch(now, request, self.report.requests % self.setup.fronts)

    # --- the router

    def route(self, now: float, front: int, work: float) -> _Device:
        setup = self.setup
        if setup.router == "round_robin":
            for _ in self.devices:
                self.turn = (self.turn + 1) % len(self.devices)
                if self.work[self.turn] < math.inf:
                    break
            return self.devices[self.turn]
        seen = self.work
        if setup.refresh:
            seen = self.seen[front]
            if now >= self.looked[front] + setup.refresh:
                seen[:] = self.work
                self.looked[front] = now
        if setup.router == "two_choices":
            one, other = self.rng.randrange(setup.devices), self.rng.randrange(setup.devices)
            chosen = one if seen[one] <= seen[other] else other
        else:
            chosen = int(seen.argmin())
        if setup.refresh:
            seen[chosen] += work  # what this front sent since its last look
        return self.devices[chosen]

    def dispatch(self, now: float, request: _Request, front: int) -> None:
        kind = self.classes[request.kind]
        device = self.route(now, front, self.works[request.kind])
        if device.down:
            device.stranded.append(request)
            return
        found = self.admit(now, device, request)
        if found is not None:
            request.tries += 1
            if request.tries <= self.setup.retries and found < math.inf:
                self.at(now + found, self.dispatch, request, front)
            else:
                self.report.refused += 1
            return
        self.work[device.number] += self.works[request.kind]
        device.requests[request] = None
        device.bytes += kind.bytes * kind.images
        if kind.encode:
            device.early += kind.images
            device.to_encode.append(request)
            self.start_encoder(now, device)
        else:
            self.add(now, device, request)
            self.tick(now, device)
        waiting = len(device.scheduler.waiting) + device.early
        self.report.most_waiting = max(self.report.most_waiting, waiting)

    def admit(self, now: float, device: _Device, request: _Request) -> float | None:
        """Seconds after which to try again, ``None`` if it is in."""
        offer, scheduler, admission = self.offers[request.kind], device.scheduler, self.admissions[device.number]
        images = len(scheduler.waiting) + device.early
        if request.deadline is None and admission.room(offer, images, device.bytes, scheduler.free):
            return None
        before = [
            Booked(self.classes[each.kind].images, self.works[each.kind], each.deadline)
            for each in (*device.to_encode, *device.encoding)
        ]
        load = load_of(scheduler, bytes=device.bytes, before=before)
        budget = None if request.deadline is None else request.deadline - now
        found = admission.admit([offer], load, now, budget=budget)
        return None if isinstance(found, Admitted) else found.retry_after

    # --- a device

    def start_encoder(self, now: float, device: _Device) -> None:
        if device.encoding or not device.to_encode:
            return
        stage, images, units = self.setup.encode, 0, 0.0
        while device.to_encode:
            kind = self.classes[device.to_encode[0].kind]
            if device.encoding and images + kind.images > stage.most:
                break
            device.encoding.append(device.to_encode.popleft())
            images += kind.images
            units += kind.images * kind.encode
        self.at(now + stage.once + stage.each * units, self.encoded, device, device.life)

    def encoded(self, now: float, device: _Device, life: int) -> None:
        if life != device.life:
            return
        ready, device.encoding = device.encoding, []
        for request in ready:
            device.early -= self.classes[request.kind].images
            self.add(now, device, request)
        self.start_encoder(now, device)
        self.tick(now, device)

    def add(self, now: float, device: _Device, request: _Request) -> None:
        kind = self.classes[request.kind]
        device.scheduler.add(request, [(image, kind.keys, 0) for image in range(kind.images)], now)

    def tick(self, now: float, device: _Device) -> None:
        if device.ticking:
            return
        setup, report = self.setup, self.report
        for lane in device.scheduler.admit(now):
            device.bytes -= self.kind_of(lane).bytes
        tick = device.scheduler.choose(now)
        if tick is None:
            return
        seconds = self.costs.seconds(tick.key, len(tick.lanes)) * device.speed
        if setup.pace is not None:
            seconds *= setup.pace(now)
        if setup.jitter:
            seconds *= math.exp(self.rng.gauss(0.0, setup.jitter))
        if setup.watch is not None:
            setup.watch(device.number, tick, now)
        device.ticking = True
        report.ticks += 1
        report.lanes += len(tick.lanes)
        report.room += self.costs.cap(tick.key)
        self.busy[device.number] += seconds
        self.at(now + seconds + setup.overhead, self.ticked, device, device.life, tick)

    def ticked(self, now: float, device: _Device, life: int, tick: Tick) -> None:
        if life != device.life:
            return
        self.work[device.number] -= self.share(tick.key) * len(tick.lanes)
        for lane in device.scheduler.ran(tick, now):
            if self.kind_of(lane).decode:
                device.to_decode.append(_request_of(lane))
            else:
                self.finished(now, device, _request_of(lane))
        device.ticking = False
        self.start_decoder(now, device)
        self.tick(now, device)

    def start_decoder(self, now: float, device: _Device) -> None:
        if device.decoding or not device.to_decode:
            return
        stage = self.setup.decode
        device.decoding = [device.to_decode.popleft() for _ in range(min(stage.most, len(device.to_decode)))]
        units = sum(self.classes[request.kind].decode for request in device.decoding)
        self.at(now + stage.once + stage.each * units, self.decoded, device, device.life)

    def decoded(self, now: float, device: _Device, life: int) -> None:
        if life != device.life:
            return
        ready, device.decoding = device.decoding, []
        for request in ready:
            self.finished(now, device, request)
        self.start_decoder(now, device)

    def finished(self, now: float, device: _Device, request: _Request) -> None:
        """An image of it."""
        request.left -= 1
        if request.left:
            return
        del device.requests[request]
        report, kind = self.report, self.classes[request.kind]
        latency = now - request.arrived
        late = kind.budget is not None and latency > kind.budget
        report.latency.append(latency)
        report.kind.append(request.kind)
        report.images += kind.images
        if kind.budget is not None:
            report.missed += late
            self.admissions[device.number].ended(met=not late)
        report.good += latency <= self.setup.limit and not late
        report.seconds = now

    # --- failures

    def fail(self, now: float, device: _Device) -> None:
        device.down += 1
        device.life += 1
        device.empty()
        self.at(now + self.setup.detect, self.detected, device, device.life)

    def detected(self, now: float, device: _Device, life: int) -> None:
        if life == device.life:
            self.work[device.number] = self.seen[:, device.number] = math.inf
            self.move(now, device)

    def move(self, now: float, device: _Device) -> None:
        """What was lost is sent to others, once."""
        lost, device.requests = list(device.requests), {}
        for request in lost:
            if request.moved:
                self.report.failed += 1
                continue
            request.moved = True
            request.left = self.classes[request.kind].images
            request.lanes.clear()
            self.report.retried += 1
            self.dispatch(now, request, 0)
        stranded, device.stranded = device.stranded, []
        for request in stranded:
            self.dispatch(now, request, 0)

    def come_back(self, now: float, device: _Device) -> None:
        device.down -= 1
        if device.down:
            return
        device.life += 1
        self.work[device.number] = self.seen[:, device.number] = 0.0
        self.move(now, device)

    def kind_of(self, lane: Lane) -> RequestClass:
        return self.classes[_request_of(lane).kind]


def _request_of(lane: Lane) -> _Request:
    assert isinstance(lane.job, _Request)
    return lane.job
