"""One bundle of an engine: its runtime and lanes, and the requests that it works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import NotFinite
from tstitch_trt.runtime import job as runtime_job
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey
from tstitch_trt.runtime.lane_runner import LaneRunner, TimedStep
from tstitch_trt.runtime.result import FailedImage, Result, SegmentTiming, not_finite
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.serve.admission import Admission, Booked, Cheaper, Load, Offer, load_of
from tstitch_trt.serve.costs import CostPoint, MeasuredCosts, StageTimes
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.scheduler import Job, Phases, Policy, Scheduler, phases_of

__all__ = ["Model", "Phase", "Request", "preview_steps", "waiting_bytes"]

Array = NDArray[np.float32]


class Phase(NamedTuple):
    """What the cost of a step depends on beside its batch."""

    member: str
    guided: bool
    size: tuple[int, int]
    controlled: bool

    @staticmethod
    def of(key: Hashable) -> Phase:
        if isinstance(key, Phase):
            return key
        assert isinstance(key, StepKey), "the scheduler's keys are those of steps"
        return Phase(key.member, key.guided, key.size, key.control is not None)


class _PhaseCosts:
    """Costs by the scheduler's keys."""

    def __init__(self, costs: MeasuredCosts) -> None:
        self._costs = costs

    def seconds(self, key: Hashable, lanes: int) -> float:
        return self._costs.seconds(Phase.of(key), lanes)

    def cap(self, key: Hashable) -> int:
        return self._costs.cap(Phase.of(key))


@dataclass(eq=False)
class Request(Job):
    """A request on its way. ``unstarted``: images that wait for a lane. ``left``: images that have not ended.

    ``previews``: the steps (from 0) after which each lane's estimate is decoded. ``phases``: of each image. ``nbytes``:
    what it holds on the host.
    """

    handle: Handle = field(kw_only=True)
    model: Model = field(kw_only=True)
    asked: runtime_job.Job = field(kw_only=True)
    previews: frozenset[int] = field(kw_only=True)
    phases: Phases = field(kw_only=True)
    nbytes: int = field(kw_only=True)
    retries: int = 0
    dropped: bool = False

    def __post_init__(self) -> None:
        segments = self.asked.plan.schedule.segments
        self.segments = [i for i, segment in enumerate(segments) for _ in range(segment.start, segment.stop)]
        self.seconds = [0.0] * len(segments)  # of device time, in each segment
        self.spans: dict[int, tuple[float, float]] = {}  # by segment: when its first step began and its last one ended
        self.unstarted = self.left = self.asked.parsed.n
        self.programs: list[LaneProgram] = []
        self.seeds: tuple[int, ...] = ()
        self.labels: tuple[int, ...] = ()
        self.prompts: tuple[str, ...] = ()
        self.failed: dict[int, FailedImage] = {}
        self.started_at = 0.0
        self.encoding = (0.0, 0.0)  # from when to when
        self.decoding = (math.inf, 0.0)
        self._latents: Array | None = None
        self._pictures: NDArray[np.uint8] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is to be done for it any more."""
        return self.dropped or self.handle.done()

    def again(self, model: Model) -> Request:
        """The same request from its beginning, on a bundle that was loaded anew; this one is dropped."""
        self.dropped = True
        return replace(self, model=model, retries=self.retries + 1, dropped=False, lanes=[])

    def add(self, image: int, latents: Array, picture: NDArray[np.uint8] | None) -> None:
        """``latents [C,h,w]`` and ``picture [H,W,C]`` of one image."""
        n = self.asked.parsed.n
        if self._latents is None:
            self._latents = np.full((n, *latents.shape), np.nan, np.float32)
        self._latents[image] = latents
        if picture is not None:
            if self._pictures is None:
                self._pictures = np.zeros((n, *picture.shape), np.uint8)
            self._pictures[image] = picture

    def fail(self, image: int, step: int, member: str) -> NotFinite | None:
        """``step`` from 1; 0 for the decoder. The error, where the request has failed with it."""
        self.failed[image] = FailedImage(image, self.seeds[image], step, member)
        if self.asked.partial and len(self.failed) < self.asked.parsed.n:
            return None
        return not_finite(self.asked.plan, [self.failed[i] for i in sorted(self.failed)], self.asked.parsed.n)

    def result(self) -> Result:
        """Once every image has ended."""
        plan, start = self.asked.plan, self.programs[0].start
        timings = tuple(
            SegmentTiming(segment.name, segment.stop - max(segment.start, start), 1e3 * seconds)
            for segment, seconds in zip(plan.schedule.segments, self.seconds, strict=True)
            if segment.stop > start
        )
        return Result(
            self._pictures if self.asked.decode else None,
            self._latents,
            self.seeds,
            self.labels,
            plan,
            timings,
            prompts=self.prompts,
            loras=self.model.runtime.loras,
            budget=self.asked.budget,
            failed=tuple(self.failed[image] for image in sorted(self.failed)),
        )


class Model:
    """``weight``: its share of the device. ``owned``: the runtime is closed with it. ``clock``: device time that it has
    had, over its weight."""

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        *,
        source: Any,
        owned: bool,
        weight: float,
        max_lanes: int | None,
        policy: Callable[[], Policy],
        room: tuple[int, int],
        cheaper: Cheaper | None,
        calibration: Iterable[CostPoint],
    ) -> None:
        self.name = name
        self.runtime = runtime
        self.source = source
        self.owned = owned
        self.weight = weight
        self.max_lanes = max_lanes or 2 * runtime.batch_limit
        self.clock = 0.0
        self.warming: Iterator[tuple[TimedStep | None, float]] | None = None
        self.warmed = 0.0  # the share that is done
        self.warm_error: Exception | None = None
        self.holding = False  # new requests wait aside, until those that were accepted before have ended
        self.held: Callable[[], None] | None = None  # what is done then
        self.aside: list[Request] = []
        self.stages = StageTimes()
        self._policy = policy
        self._room = room  # images and bytes that may wait
        self._cheaper = cheaper
        self._points = tuple(calibration)
        self._block = ExitStack()

    def enter(self) -> None:
        """Takes the runtime for itself, on the thread that is to run its lanes. Waits for its other callers."""
        self.runner: LaneRunner = self._block.enter_context(self.runtime.lanes(self.max_lanes))
        runner = self.runner
        self.costs = MeasuredCosts(
            self._points,
            most=lambda key: runner.most(Phase.of(key)),
            optimum=lambda key: runner.tuned(Phase.of(key)),
            batch=lambda key, lanes: runner.bucket(Phase.of(key), lanes),
        )
        costs = _PhaseCosts(self.costs)
        self.scheduler = Scheduler(self.max_lanes, self._policy(), costs)
        self.admission = Admission(*self._room, costs, self.stages, cheaper=self._cheaper)

    def leave(self) -> None:
        """Gives the runtime back, or closes it where it is the engine's own."""
        try:
            self._block.close()
        finally:
            if self.owned:
                self.runtime.close(cancel=True)

    def phases(self, job: runtime_job.Job) -> Phases:
        """The phases of each image of a request, before it is encoded."""
        plan, parsed, members = job.plan, job.parsed, self.runtime.manifest.members
        control = parsed.control is not None
        keys = [
            Phase(name, guided, parsed.size, control and members[name].controlled)
            for name, guided in zip(plan.schedule.names, plan.guided, strict=True)
        ]
        first = plan.start
        return tuple((key, max(first, start), stop) for key, start, stop in phases_of(keys) if stop > first)

    def offer(self, job: runtime_job.Job) -> Offer:
        """What admission is told of a request."""
        parsed, names = job.parsed, job.plan.schedule.names
        return Offer(
            images=parsed.n,
            bytes=self.request_bytes(job),
            phases=self.phases(job),
            size=parsed.size,
            fraction=names.count(self.runtime.members[0]) / len(names),
            encoded=bool(parsed.prompts) or parsed.init is not None,
            decoded=job.decode,
        )

    def load(self, requests: Collection[Request]) -> Load:
        """What there is to do. ``requests``: those of this bundle that are open."""
        early = [
            Booked(request.unstarted, request.handle.n * self._seconds(request.phases), request.deadline)
            for request in requests
            if not request.programs
        ]
        return load_of(self.scheduler, bytes=waiting_bytes(requests), before=early)

    def _seconds(self, phases: Phases) -> float:
        """Of device time of one image, in batches as large as they are to be."""
        found = 0.0
        for key, start, stop in phases:
            size = self.costs.cap(Phase.of(key))
            found += (stop - start) * self.costs.seconds(Phase.of(key), size) / size
        return found

    def request_bytes(self, job: runtime_job.Job) -> int:
        """What a request holds on the host: what it brought, its latents and its pictures."""
        parsed, manifest = job.parsed, self.runtime.manifest
        height, width = parsed.size
        area = height * width
        each = 4 * manifest.latent.channels * area * (4 if parsed.init is not None else 1)
        if job.decode:
            each += 3 * area * manifest.decoder.factor**2
        arrays: list[Any] = [
            parsed.latents,
            parsed.control,
            *(a for by in parsed.embeddings.values() for a in by.values()),
        ]
        if parsed.init is not None:
            arrays += [parsed.init.image, parsed.init.mask, parsed.init.masked_image]
        given = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        texts = sum(map(len, (*parsed.prompts, *(parsed.negative_prompts or ()))))
        return parsed.n * each + given + 4 * texts


def waiting_bytes(requests: Iterable[Request]) -> int:
    """What those hold on the host that have images without a lane."""
    return sum(request.nbytes for request in requests if request.unstarted)


def preview_steps(start: int, stop: int, count: int) -> frozenset[int]:
    """``count`` steps of ``start..stop``, evenly spread, the last one left out: its picture is the result."""
    steps = stop - start
    if steps < 2 or not count:
        return frozenset()
    return frozenset(min(stop - 2, start + math.ceil(steps * (i + 1) / (count + 1)) - 1) for i in range(count))
