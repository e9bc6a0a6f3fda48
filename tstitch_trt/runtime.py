"""The runtime: walks a plan over loaded engines while the latents stay in one arena."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle import Bundle
from tstitch_engines.device import Device
from tstitch_engines.errors import BadInput, Cancelled, NotFinite, OutOfProfile, Unavailable
from tstitch_engines.manifest import Manifest
from tstitch_engines.rows import FLAG_STORE, ROW
from tstitch_trt.plan import Plan, make_plan
from tstitch_trt.request import Request
from tstitch_trt.result import Result, SegmentTiming, StepEvent
from tstitch_trt.stepper import Stepper

__all__ = ["Runtime"]

Callback = Callable[[StepEvent], object]


class Runtime:
    """Loaded engines of one bundle on one device. Made by ``tstitch_trt.load``.

    One request at a time: a second call from another thread while one runs raises ``BadInput``. Use it as a context
    manager, or call ``close``.
    """

    def __init__(
        self, bundle: Bundle, device: Device, backend_name: str, engines: Mapping[str, Engine], load_ms: float
    ) -> None:
        self.bundle = bundle
        self.device = device
        self.backend_name = backend_name
        self.load_ms = load_ms
        self._stepper = Stepper(bundle.manifest, device, engines)
        self._busy = threading.Lock()

    # --- what it is

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def batch_limit(self) -> int:
        """Images per engine call when unguided; half of it when guided."""
        return self._stepper.batch_limit

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, in the bundle's order: ``fraction`` goes from the first to the last."""
        return self._stepper.members

    def memory(self) -> dict[str, int]:
        """Bytes by purpose that the runtime itself holds on the device (an engine's own memory is the backend's)."""
        return {"arena": self._stepper.arena.nbytes, "engine io": self._stepper.io_bytes()}

    def close(self) -> None:
        """Releases the engines. The runtime can't be used afterwards."""
        self._stepper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- sampling

    def plan(self, **settings: Any) -> Plan:
        """The plan of a request, without running it. Takes the keywords of ``tstitch_trt.plan.make_plan``."""
        return make_plan(self.manifest, **settings)

    def sample(
        self,
        *,
        labels: int | Sequence[int] | None = None,
        n: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        latents: NDArray[np.float32] | None = None,
        start_step: int = 0,
        callback: Callback | None = None,
        decode: bool = True,
        **settings: Any,
    ) -> Result:
        """Draws images.

        ``labels``: class of each image (cycled up to ``n``; ``None`` cycles through all classes). ``seeds``: one per
        image; otherwise image i has ``seed + i``. ``latents``: unit Gaussian noise float32 ``[N,C,H,W]`` to start
        from in place of the seeds' own; with ``start_step`` k > 0 they are the state before step k instead.
        ``callback`` gets a ``StepEvent`` after each step and cancels by returning ``False``. ``settings`` are the
        keywords of ``tstitch_trt.plan.make_plan``: steps, solver, schedule, fraction, guidance...

        Images larger in number than the engines' batch profile run in chunks. Raises ``BadInput`` and its kinds for a
        request that can't be right, ``NotFinite`` with step and member, ``Cancelled``.
        """
        walk = self._walk(
            Request.make(self.manifest, labels=labels, n=n, seed=seed, seeds=seeds, latents=latents, start=start_step),
            self.plan(**settings),
            decode=decode,
            events=callback is not None,
        )
        while True:
            try:
                event = next(walk)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if callback is not None and callback(event) is False:
                walk.close()
                raise Cancelled(
                    f"cancelled by the callback after step {event.step} of {event.steps}",
                    hint="return anything but False from the callback to go on",
                )

    def iterate(
        self,
        *,
        labels: int | Sequence[int] | None = None,
        n: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        latents: NDArray[np.float32] | None = None,
        start_step: int = 0,
        decode: bool = True,
        **settings: Any,
    ) -> Generator[StepEvent, None, Result]:
        """Like ``sample``, as a generator of ``StepEvent``; its return value is the ``Result``. Close it to cancel."""
        request = Request.make(
            self.manifest, labels=labels, n=n, seed=seed, seeds=seeds, latents=latents, start=start_step
        )
        return self._walk(request, self.plan(**settings), decode=decode, events=True)

    def _walk(self, request: Request, plan: Plan, *, decode: bool, events: bool) -> Generator[StepEvent, None, Result]:
        request.check_start(plan)
        lanes_limit = self._lanes_limit(plan)
        if not self._busy.acquire(blocking=False):
            raise BadInput(
                "this runtime is already sampling",
                hint="wait for the running request, close its iterator, or load one runtime per thread",
            )
        try:
            rows = plan.rows.astype(np.float32)
            if events:  # previews read every step's estimate
                rows[:, ROW["FLAGS"]] = (rows[:, ROW["FLAGS"]].astype(np.int64) | FLAG_STORE).astype(np.float32)
            chunks = [slice(i, min(i + lanes_limit, request.n)) for i in range(0, request.n, lanes_limit)]
            latents = np.empty((request.n, *self._stepper.arena.latent_shape), np.float32)
            timings: list[SegmentTiming] = []
            for index, chunk in enumerate(chunks):
                times = yield from self._chunk(request, plan, rows, chunk, index, len(chunks), events)
                latents[chunk] = self.device.download(self._stepper.arena.latents)[: chunk.stop - chunk.start]
                before = timings or [SegmentTiming(t.member, t.steps, 0.0) for t in times]
                timings = [SegmentTiming(a.member, a.steps, a.ms + b.ms) for a, b in zip(before, times, strict=True)]
            images = self.decode(latents) if decode and self.manifest.decoder.kind != "none" else None
            return Result(images, latents, request.seeds, request.labels, plan, tuple(timings))
        finally:
            self._busy.release()

    def _chunk(
        self,
        request: Request,
        plan: Plan,
        rows: NDArray[np.float32],
        chunk: slice,
        index: int,
        chunks: int,
        events: bool,
    ) -> Generator[StepEvent, None, list[SegmentTiming]]:
        count = chunk.stop - chunk.start
        lanes = self._padded(count, plan)
        pad = [0] * (lanes - count)
        labels = [*request.labels[chunk], *pad]
        state = None if request.latents is None else request.latents[chunk]
        if state is not None:
            state = np.concatenate([state, np.zeros((len(pad), *state.shape[1:]), np.float32)])
            if request.start == 0:
                state = state * np.float32(plan.init_scale)
        self._stepper.arena.start(
            rows, [*request.seeds[chunk], *pad], step=request.start, scale=plan.init_scale, latents=state
        )
        for name in dict.fromkeys(plan.schedule.names[request.start :]):
            for guided in {g for n, g in zip(plan.schedule.names, plan.guided, strict=True) if n == name}:
                self._stepper.condition(name, lanes, guided, labels)
        fault = self._stepper.host_fault
        watch = self.device.stopwatch()
        segments: list[tuple[str, int]] = []
        for segment in plan.schedule.segments:
            if segment.stop <= request.start:
                continue
            watch.mark()
            segments.append((segment.name, segment.stop - max(segment.start, request.start)))
            for step in range(max(segment.start, request.start), segment.stop):
                self._stepper.step(segment.name, lanes, guided=plan.guided[step], rescale=plan.rescale)
                if fault is not None and (fault[:count] >= 0).any():
                    self._raise_fault(fault, count, request.seeds[chunk], plan)
                if events:
                    yield self._event(plan, step, index, chunks, segment.name, count)
        watch.mark()
        times = watch.milliseconds()
        if fault is None:
            self._raise_fault(self.device.download(self._stepper.arena.fault), count, request.seeds[chunk], plan)
        return [SegmentTiming(name, steps, ms) for (name, steps), ms in zip(segments, times, strict=True)]

    # --- limits and errors

    def _lanes_limit(self, plan: Plan) -> int:
        if not any(plan.guided):
            return self.batch_limit
        if self.batch_limit < 2:
            raise OutOfProfile(
                f"guidance runs two halves per image, and the engines' largest batch is {self.batch_limit}",
                hint="pass guidance=1 (--guidance 1), or build again with --batch 1:8:16",
            )
        return self.batch_limit // 2

    def _padded(self, count: int, plan: Plan) -> int:
        """Lanes to run for ``count`` images: more than ``count`` where the profile's smallest batch asks for it."""
        floor = self._stepper.batch_floor if not all(plan.guided) else -(-self._stepper.batch_floor // 2)
        if floor > self._lanes_limit(plan):
            raise OutOfProfile(
                f"the engines' batch profile {self._stepper.batch_floor}..{self.batch_limit} has no room for both "
                "guided and unguided steps",
                hint="build again with --batch 1:8:16",
            )
        return max(count, floor)

    def _raise_fault(self, fault: NDArray[np.int32], count: int, seeds: Sequence[int], plan: Plan) -> None:
        bad = [lane for lane in range(count) if fault[lane] >= 0]
        if not bad:
            return
        step = int(fault[bad[0]])
        name = plan.schedule.names[step]
        raise NotFinite(
            f"NaN or infinity in the latents after step {step + 1} of {len(plan.schedule)}, made by member {name!r} "
            f"(timestep {plan.table.t[step]:g}, seed {seeds[bad[0]]}; {len(bad)} of {count} lanes)",
            hint=f"if {name!r} is an fp16 engine, build it with --precision {name}=fp32 or bf16; "
            "otherwise check its checkpoint and parametrisation with: tstitch-trt inspect BUNDLE",
        )

    # --- pictures

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents float32 ``[N,C,H,W]`` to pictures uint8 ``[N,H,W,C]``. Raises ``Unavailable`` without a decoder."""
        if self.manifest.decoder.kind == "none":
            raise Unavailable(
                f"the bundle {self.manifest.name!r} has no decoder: it gives latents, not pictures",
                hint="write the latents (--latents-out FILE.npy, or sample(decode=False)) and decode them yourself",
            )
        latent = self.manifest.latent
        pictures = (latents / latent.scaling + latent.shift).transpose(0, 2, 3, 1)
        out: NDArray[np.uint8] = np.clip(np.rint((pictures + 1) * 127.5), 0, 255).astype(np.uint8)
        return out

    def _event(self, plan: Plan, step: int, index: int, chunks: int, name: str, count: int) -> StepEvent:
        arena, device = self._stepper.arena, self.device

        def latents() -> NDArray[np.float32]:
            out: NDArray[np.float32] = device.download(arena.latents)[:count]
            return out

        def estimate() -> NDArray[np.float32]:
            out: NDArray[np.float32] = device.download(arena.history)[step % 2, :count]
            return out

        time = float(plan.table.t[step])
        return StepEvent(step + 1, len(plan.schedule), index + 1, chunks, name, time, latents, estimate, self.decode)

    # --- measurement

    def time_member(
        self, name: str, batch: int, *, guided: bool = False, repeats: int = 20, warmup: int = 3
    ) -> list[float]:
        """Milliseconds of ``repeats`` bare engine calls on ``batch`` lanes, one waited-for call at a time."""
        return self._stepper.time_engine(name, batch, guided=guided, repeats=repeats, warmup=warmup)

    def time_step_kernels(
        self, batch: int, *, guided: bool = False, repeats: int = 100, warmup: int = 10
    ) -> list[float]:
        """Milliseconds of ``repeats`` pairs of ``prepare`` and ``advance`` on ``batch`` lanes (first member's types).

        Overwrites the arena.
        """
        rows = self.plan(schedule=self.members[0], guidance=1.0).rows.astype(np.float32)
        return self._stepper.time_kernels(rows, batch, guided=guided, repeats=repeats, warmup=warmup)
