"""The images of a request that run together: put into lanes, walked through the plan, and brought back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import Buffer, Device, Download, Stopwatch
from tstitch_engines.device.step_row import FLAG_STORE, HISTORY, ROW
from tstitch_engines.errors import NotFinite
from tstitch_trt.plan.plan import Plan
from tstitch_trt.plan.step_rows import with_blend
from tstitch_trt.request.request import Request
from tstitch_trt.runtime.result import Decode, SegmentTiming, StepEvent
from tstitch_trt.runtime.step_graphs import StepKey
from tstitch_trt.runtime.stepper import Stepper

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
        check: Callable[[], None],
    ) -> None:
        """``check`` is called before each step, and raises to end the request.

        Raises ``OutOfProfile`` when the engines' profiles have no room for the plan.
        """
        self._stepper = stepper
        self._device = device
        self._request = request
        self._plan = plan
        self._decode = decode
        self._events = events
        self._check = check
        self._guided = any(plan.guided)
        self._splitting = stepper.splitting
        self._counts = self._splitting.chunks(request.n, guided=self._guided)
        # A member that paints into a picture is given the picture; for any other the picture is put back.
        self._blends = {
            name: request.picture is not None and request.picture.mask is not None and not member.inpaints
            for name, member in stepper.manifest.members.items()
        }
        blended = np.array([self._blends[name] for name in plan.schedule.names])
        rows = np.where(blended[:, None], with_blend(plan.rows, given_noise=True), plan.rows)
        self._rows = rows.astype(np.float32)
        if events:  # previews read every step's estimate
            flags = self._rows[:, ROW["FLAGS"]].astype(np.int64) | FLAG_STORE
            self._rows[:, ROW["FLAGS"]] = flags.astype(np.float32)

    def chunks(self) -> list[Chunk]:
        ends = list(accumulate(self._counts))
        return [
            Chunk(stop - count, stop, index, len(ends))
            for index, (count, stop) in enumerate(zip(self._counts, ends, strict=True))
        ]

    def run(self, chunk: Chunk, keep: Buffer | None) -> Generator[StepEvent, None, PendingChunk]:
        """Enqueues all steps. The latents go to the buffer ``keep`` on the device, or without one to the host."""
        plan, request, stepper = self._plan, self._request, self._stepper
        lanes = self._splitting.lanes(chunk.count, guided=plan.guided)
        stepper.shape(*request.size)
        made = {
            (name, guided): stepper.kind(
                name,
                lanes,
                request.conditioning,
                guided=guided,
                rescale=guided and plan.rescale,
                control=request.control,
                blend=self._blends[name],
            )
            for name, guided in dict.fromkeys(zip(plan.schedule.names, plan.guided, strict=True))
        }
        kinds = [made[which] for which in zip(plan.schedule.names, plan.guided, strict=True)]
        used = dict.fromkeys(kinds[request.start :])
        stepper.ready(used)
        pad = [0] * (lanes - chunk.count)
        latents = request.latents
        if isinstance(latents, np.ndarray):
            latents = latents[chunk.start : chunk.stop]
        elif latents is not None:
            shape = (chunk.count, *latents.shape[1:])
            latents = self._device.view(latents, chunk.start * latents.nbytes // latents.shape[0], shape, "float32")
        stepper.arena.start(
            self._rows,
            [*request.seeds[chunk.start : chunk.stop], *pad],
            step=request.start,
            scale=plan.init_scale if request.from_noise else 1.0,
            latents=latents,
        )
        if (kept := request.picture) is not None and kept.mask is not None and any(kind.blend for kind in used):
            part = slice(chunk.start, chunk.stop)
            stepper.arena.keep(kept.clean[part], kept.mask[part], kept.noise[part])
        stepper.condition(request.conditioning, used, start=chunk.start, stop=chunk.stop, guided=self._guided)
        watch = self._device.stopwatch()
        segments = yield from self._segments(chunk, kinds, watch)
        watch.mark()
        final = stepper.arena.first(chunk.count)
        if keep is not None:
            self._device.copy(keep, final)
        return PendingChunk(
            chunk,
            None if keep is not None else self._device.download_later(final),
            self._device.download_later(stepper.arena.fault),
            watch,
            tuple(segments),
        )

    def _segments(
        self, chunk: Chunk, kinds: Sequence[StepKey], watch: Stopwatch
    ) -> Generator[StepEvent, None, list[tuple[str, int]]]:
        stepper, fault = self._stepper, self._stepper.host_fault
        segments = []
        for segment in self._plan.schedule.segments:
            step = max(segment.start, self._request.start)
            if segment.stop <= step:
                continue
            watch.mark()
            segments.append((segment.name, segment.stop - step))
            for kind, equal in groupby(kinds[step : segment.stop]):
                count = len(list(equal))
                whole = None if self._events else stepper.segment(kind, count)
                if whole is not None:
                    self._check()
                    whole()
                    step += count
                    continue
                one = stepper.stepping(kind)
                for _ in range(count):
                    self._check()
                    one()
                    if fault is not None and (fault[: chunk.count] >= 0).any():
                        self._raise_fault(fault, chunk)
                    if self._events:
                        yield self._event(step, chunk)
                    step += 1
        return segments

    def collect(self, done: PendingChunk) -> tuple[NDArray[np.float32] | None, list[SegmentTiming]]:
        """The chunk's latents, unless they stay on the device, and times. Waits for it. Raises ``NotFinite``."""
        self._raise_fault(done.fault.get(), done.chunk)
        times = done.watch.milliseconds()
        timings = [SegmentTiming(name, steps, ms) for (name, steps), ms in zip(done.segments, times, strict=True)]
        return None if done.latents is None else done.latents.get(), timings

    # --- errors

    def _raise_fault(self, fault: NDArray[np.int32], chunk: Chunk) -> None:
        bad = [lane for lane in range(chunk.count) if fault[lane] >= 0]
        if not bad:
            return
        step = int(fault[bad[0]])
        name = self._plan.schedule.names[step]
        raise NotFinite(
            f"NaN or infinity in the latents after step {step + 1} of {len(self._plan.schedule)}, made by member "
            f"{name!r} (timestep {self._plan.table.t[step]:g}, seed {self._request.seeds[chunk.start + bad[0]]}; "
            f"{len(bad)} of {chunk.count} lanes)",
            hint=f"if {name!r} is an fp16 engine, build it with --precision {name}=fp32 or bf16; "
            "otherwise check its checkpoint and parametrisation with: tstitch-trt inspect BUNDLE",
        )

    def _event(self, step: int, chunk: Chunk) -> StepEvent:
        arena, device = self._stepper.arena, self._device

        def latents() -> NDArray[np.float32]:
            return device.download(arena.first(chunk.count))

        def estimate() -> NDArray[np.float32]:
            stored: NDArray[np.float32] = device.download(arena.history)[step % HISTORY, : chunk.count]
            p, q = self._plan.table.clean_estimate(step)
            return stored if p == 0 else np.float32(p) * latents() + np.float32(q) * stored

        return StepEvent(
            step + 1,
            len(self._plan.schedule),
            chunk.index + 1,
            chunk.total,
            self._plan.schedule.names[step],
            float(self._plan.table.t[step]),
            latents,
            estimate,
            self._decode,
        )


class ResultCollector:
    """What the chunks of a walk gave, as far as they were added: in the order of the images."""

    def __init__(self, walk: Trajectory, shape: tuple[int, ...] | None, decode: Decode | None) -> None:
        """``shape``: of all latents, ``None`` when they stay on the device. ``decode``: to make pictures of them."""
        self._walk = walk
        self._decode = decode
        self._pictures: list[NDArray[np.uint8]] = []
        self.latents = None if shape is None else np.empty(shape, np.float32)
        self.timings: list[SegmentTiming] = []

    def add(self, done: PendingChunk) -> None:
        """Waits for the chunk. Raises ``NotFinite``."""
        part, times = self._walk.collect(done)
        before = self.timings or [SegmentTiming(t.member, t.steps, 0.0) for t in times]
        self.timings = [SegmentTiming(a.member, a.steps, a.ms + b.ms) for a, b in zip(before, times, strict=True)]
        if part is not None and self.latents is not None:
            self.latents[done.chunk.start : done.chunk.stop] = part
            if self._decode is not None:
                self._pictures.append(self._decode(part))

    def pictures(self) -> NDArray[np.uint8] | None:
        return np.concatenate(self._pictures) if self._pictures else None
