"""The images of a request that run together: put into lanes, walked through the plan, and brought back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, groupby

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import Buffer, Device, Download, Stopwatch
from tstitch_engines.device.step_row import HISTORY
from tstitch_engines.trace import Arg, recording, span
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.request import Request
from tstitch_trt.runtime.lane_program import StepKey, lane_programs
from tstitch_trt.runtime.result import Decode, FailedImage, SegmentTiming, StepEvent, not_finite
from tstitch_trt.runtime.stepper import Stepper
from tstitch_trt.runtime.timing import DeviceSpans

DecodeEach = Callable[[NDArray[np.float32]], tuple[NDArray[np.uint8], NDArray[np.bool_]]]
"""Pictures of latents float32 ``[N,C,h,w]``, and which of them are good."""

__all__ = ["Chunk", "PendingChunk", "ResultCollector", "Trajectory"]


@dataclass(frozen=True)
class Chunk:
    """Images ``start`` to ``stop`` of the request; ``index`` of ``total`` chunks."""

    start: int
    stop: int
    index: int
    total: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PendingChunk:
    """A chunk whose steps are all enqueued. On CUDA the device may still work on it."""

    chunk: Chunk
    latents: Download | None
    fault: Download
    watch: Stopwatch
    segments: tuple[tuple[str, int], ...]


class Trajectory:
    """One request over one plan. Its chunks run one after another, each enqueued while the one before is computed."""

    def __init__(
        self,
        stepper: Stepper,
        device: Device,
        request: Request,
        plan: Plan,
        *,
        decode: Decode,
        events: bool,
        partial: bool,
        check: Callable[[], None],
    ) -> None:
        """``decode``: for previews. ``partial``: an image that fails does not end the steps of the others.

        ``check`` is called before each step, and raises to end the request.

        Raises ``OutOfProfile`` when the engines' profiles have no room for the plan.
        """
        self._stepper = stepper
        self._device = device
        self._request = request
        self.plan = plan
        self._decode = decode
        self._events = events
        self._partial = partial
        self._check = check
        self._splitting = stepper.splitting
        self._spans = DeviceSpans.of(device)
        self._counts = self._splitting.chunks(request.n, guided=any(plan.guided))

    def chunks(self) -> list[Chunk]:
        ends = list(accumulate(self._counts))
        return [
            Chunk(stop - count, stop, index, len(ends))
            for index, (count, stop) in enumerate(zip(self._counts, ends, strict=True))
        ]

    def run(self, chunk: Chunk, target: Buffer | None) -> Generator[StepEvent, None, PendingChunk]:
        """Enqueues all steps. The latents go to the buffer ``target`` on the device, or without one to the host."""
        with span("chunk", chunk=chunk.index + 1, chunks=chunk.total, images=chunk.count):
            return (yield from self._run(chunk, target))

    def _run(self, chunk: Chunk, target: Buffer | None) -> Generator[StepEvent, None, PendingChunk]:
        plan, request, stepper = self.plan, self._request, self._stepper
        lanes = self._splitting.lanes(chunk.count, guided=plan.guided)
        images = range(chunk.start, chunk.stop)
        programs = lane_programs(
            stepper.manifest, stepper.profiles, plan, request, images, store_estimates=self._events
        )
        made = {key: key._replace(lanes=lanes) for key in dict.fromkeys(programs[0].keys)}
        keys = [made[key] for key in programs[0].keys]
        stepper.ready(dict.fromkeys(keys[request.start :]))
        stepper.start(0, *programs)
        stepper.activate(range(chunk.count), lanes)
        watch = self._device.stopwatch()
        segments = yield from self._segments(chunk, keys, watch)
        watch.mark()
        final = stepper.arena.lanes(0, chunk.count, request.size)
        if target is not None:
            self._device.copy(target, final)
        return PendingChunk(
            chunk,
            None if target is not None else self._device.download_later(final),
            self._device.download_later(stepper.arena.buffers.fault),
            watch,
            tuple(segments),
        )

    def _segments(
        self, chunk: Chunk, keys: Sequence[StepKey], watch: Stopwatch
    ) -> Generator[StepEvent, None, list[tuple[str, int]]]:
        stepper, fault = self._stepper, None if self._partial else self._stepper.host_fault
        segments = []
        for segment in self.plan.schedule.segments:
            step = max(segment.start, self._request.start)
            if segment.stop <= step:
                continue
            watch.mark()
            segments.append((segment.name, segment.stop - step))
            for key, equal in groupby(keys[step : segment.stop]):
                steps = len(list(equal))
                whole = None if self._events else stepper.segment(key, steps)
                if whole is not None:
                    self._check()
                    self._traced(whole, key, step, steps)()
                    step += steps
                    continue
                one = self._traced(stepper.stepping(key), key, step)
                for _ in range(steps):
                    self._check()
                    one()
                    if fault is not None and (fault[: chunk.count] >= 0).any():
                        raise not_finite(self.plan, self._failed(fault, chunk), chunk.count)
                    if self._events:
                        yield self._event(step, chunk)
                    step += 1
        return segments

    def _traced(self, launch: Callable[[], None], key: StepKey, first: int, steps: int = 1) -> Callable[[], None]:
        """``launch``, which does the next ``steps`` steps each time from step ``first`` on, with a span for each."""
        if not recording():
            return launch
        numbers = count(first + 1, steps)
        same: dict[str, Arg] = {"member": key.member, "lanes": key.lanes, "guided": key.guided}
        if steps > 1:
            same["steps"] = steps

        def run() -> None:
            args: dict[str, Arg] = {"step": next(numbers), **same}
            if self._spans is not None:
                self._spans.mark(None)  # the device may have waited for this step
            with span("step", **args):
                launch()
            if self._spans is not None:
                self._spans.mark("step", **args)

        return run

    def end_spans(self) -> None:
        """Waits for the device if a trace is recorded, which is then given the times of the steps."""
        if self._spans is not None:
            self._spans.end()

    def collect(self, done: PendingChunk) -> tuple[NDArray[np.float32] | None, list[SegmentTiming], list[FailedImage]]:
        """The chunk's latents, unless they stay on the device, times, and the images that failed. Waits for it."""
        with span("wait and download", chunk=done.chunk.index + 1):
            failed = self._failed(done.fault.get(), done.chunk)
            times = done.watch.milliseconds()
            timings = [SegmentTiming(name, steps, ms) for (name, steps), ms in zip(done.segments, times, strict=True)]
            return None if done.latents is None else done.latents.get(), timings, failed

    # --- errors

    def _failed(self, fault: NDArray[np.int32], chunk: Chunk) -> list[FailedImage]:
        """The images whose lanes have a ``fault``: the step at which their latents were not finite any more."""
        seeds, names = self._request.seeds, self.plan.schedule.names
        lanes = [lane for lane in range(chunk.count) if fault[lane] >= 0]
        return [
            FailedImage(image, seeds[image], int(fault[lane]) + 1, names[int(fault[lane])])
            for lane in lanes
            for image in [chunk.start + lane]
        ]

    def _event(self, step: int, chunk: Chunk) -> StepEvent:
        arena, device = self._stepper.arena, self._device

        def latents() -> NDArray[np.float32]:
            return device.download(arena.lanes(0, chunk.count, self._request.size))

        def estimate() -> NDArray[np.float32]:
            stored = arena.estimates(step % HISTORY, 0, chunk.count, self._request.size)
            p, q = self.plan.table.clean_estimate(step)
            return stored if p == 0 else np.float32(p) * latents() + np.float32(q) * stored

        return StepEvent(
            step + 1,
            len(self.plan.schedule),
            chunk.index + 1,
            chunk.total,
            self.plan.schedule.names[step],
            float(self.plan.table.t[step]),
            latents,
            estimate,
            self._decode,
        )


class ResultCollector:
    """What the chunks of a trajectory gave, as far as they were added: in the order of the images."""

    def __init__(
        self,
        trajectory: Trajectory,
        seeds: Sequence[int],
        shape: tuple[int, ...] | None,
        decode: DecodeEach | None,
        *,
        partial: bool,
    ) -> None:
        """``shape``: of all latents, ``None`` when they stay on the device. ``decode``: to make pictures of them.

        ``partial``: images that fail are no error while there are others.
        """
        self._trajectory = trajectory
        self._seeds = seeds
        self._decode = decode
        self._partial = partial
        self._pictures: list[NDArray[np.uint8]] = []
        self._failed: list[FailedImage] = []
        self._added = 0
        self.latents = None if shape is None else np.full(shape, np.nan, np.float32)
        self.timings: list[SegmentTiming] = []

    def add(self, done: PendingChunk) -> None:
        """Waits for the chunk. Raises ``NotFinite``."""
        part, times, failed = self._trajectory.collect(done)
        chunk = done.chunk
        before = self.timings or [SegmentTiming(t.member, t.steps, 0.0) for t in times]
        self.timings = [SegmentTiming(a.member, a.steps, a.ms + b.ms) for a, b in zip(before, times, strict=True)]
        if part is not None and self.latents is not None:
            part[[each.image - chunk.start for each in failed]] = np.nan
            if self._decode is not None:
                pictures, good = self._decode(part)
                known = {each.image for each in failed}
                bad = [chunk.start + int(lane) for lane in np.flatnonzero(~good)]
                failed += [FailedImage(i, self._seeds[i], 0, "vae_decoder") for i in bad if i not in known]
                self._pictures.append(pictures)
            self.latents[chunk.start : chunk.stop] = part
        self._failed += failed
        self._added = chunk.stop
        if failed and (not self._partial or len(self._failed) == len(self._seeds)):
            raise not_finite(self._trajectory.plan, self._failed, len(self._seeds) if self._partial else chunk.count)

    def failed(self, others: Sequence[FailedImage] = ()) -> tuple[FailedImage, ...]:
        """The images that were not drawn: those that failed, here and among the ``others``, and those not reached."""
        found = {each.image: each for each in (*self._failed, *others)}
        for image in range(self._added, len(self._seeds)):
            found.setdefault(image, FailedImage(image, self._seeds[image], 0, ""))
        return tuple(found[image] for image in sorted(found))

    def pictures(self) -> NDArray[np.uint8] | None:
        """One for each image; black where there is none."""
        if not self._pictures:
            return None
        black = np.zeros((len(self._seeds) - self._added, *self._pictures[0].shape[1:]), np.uint8)
        return np.concatenate([*self._pictures, black])
