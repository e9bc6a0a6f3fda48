"""The lanes of a runtime in the hands of whoever serves many requests at once: encode, step, decode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import Device, Download, Stopwatch
from tstitch_engines.device.step_row import HISTORY
from tstitch_engines.errors import Closed, OutOfProfile, TStitchError
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.request.request import Request
from tstitch_trt.request.synthetic import PROMPTS, synthetic_request
from tstitch_trt.request.text import Encoded, Texts
from tstitch_trt.runtime.job import Job
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey, lane_programs
from tstitch_trt.runtime.stepper import Stepper
from tstitch_trt.runtime.text_encoder import TextEncoders
from tstitch_trt.runtime.vae import Vae
from tstitch_trt.runtime.work_queue import EXIT, Turn

if TYPE_CHECKING:
    from tstitch_trt.request.init_image import Encode

__all__ = ["Answer", "LaneRunner", "TimedStep"]

T = TypeVar("T")
Array = NDArray[np.float32]
_STEP_KEYS: Final = 256  # a server has every batch of every phase at several sizes


class Phased(Protocol):
    """What of a ``StepKey`` says how many lanes fit one batch."""

    @property
    def member(self) -> str: ...
    @property
    def guided(self) -> bool: ...


class MakeJob(Protocol):
    """A request for lanes, checked as far as that needs no engine: for any thread, during the block and after it."""

    def __call__(
        self,
        options: SampleOptions,
        *,
        decode: bool | None = None,
        events: bool = False,
        within: float | None = None,
        partial: bool = False,
    ) -> Job: ...


class MakeRequest(Protocol):
    def __call__(self, job: Job, texts: Texts, encode: Encode | None) -> Request: ...


@dataclass(frozen=True)
class TimedStep:
    """One step of ``lanes`` lanes took ``seconds``."""

    key: StepKey
    lanes: int
    seconds: float


@dataclass(frozen=True)
class Answer:
    """The latents of one lane on their way to the host, float32 ``[1,C,h,w]``, and the faults of all slots."""

    slot: int
    latents: Download
    faults: _Once

    def fault(self) -> int:
        """The step after which the lane was not finite, -1 where it is. Waits for the device."""
        return int(self.faults.get()[self.slot])


class LaneRunner:
    """Made by ``Runtime.lanes``, which has the runtime to itself until its block ends.

    ``encode`` and ``decode`` are each for one thread at a time, which may be two; all else that touches lanes is for
    the thread of the block. After the block every call raises ``Closed``.
    """

    def __init__(
        self,
        stepper: Stepper,
        device: Device,
        texts: TextEncoders,
        vae: Vae,
        make: MakeJob,
        request: MakeRequest,
        turn: Turn,
        backend: str,
    ) -> None:
        """``make``: a job of options. ``request``: encodes one job."""
        self._stepper = stepper
        self._device = device
        self._texts = texts
        self._vae = vae
        self.job: MakeJob = make
        self._request = request
        self._turn = turn
        self._backend = backend
        self._keys_before, stepper.most_keys = stepper.most_keys, _STEP_KEYS
        self._stages = {name: threading.Lock() for name in ("encode", "decode")}
        self._over = False

    @property
    def closed(self) -> bool:
        return self._over

    @property
    def synchronous(self) -> bool:
        """Whether a step is done when ``step`` returns: on the host."""
        return self._stepper.host_fault is not None

    @property
    def slots(self) -> int:
        return self._stepper.arena.slots

    def most(self, key: Phased) -> int:
        """Lanes of one batch. Raises ``OutOfProfile`` where there are none."""
        return self._stepper.splitting.most(guided=key.guided)

    def tuned(self, key: Phased) -> int:
        """Lanes of the batch that the member's engine was optimised for, at most ``most``."""
        rows = self._stepper.profiles[key.member].dims["B"].opt
        return max(1, min(self.most(key), rows // (2 if key.guided else 1)))

    def bucket(self, key: Phased, lanes: int) -> int:
        """Lanes that run, spare ones counted, in a batch of ``lanes``."""
        return self._stepper.splitting.lanes(lanes, guided=(key.guided,))

    # --- encode

    def encode(self, jobs: Sequence[Job]) -> list[Request | Exception]:
        """Prompts and pictures of all jobs, each kind in as few calls as their sizes allow; what failed in its place.

        A request's own texts are laid out as they are when it is encoded alone.
        """
        return self._stage("encode", lambda: self._encode(jobs))

    def _encode(self, jobs: Sequence[Job]) -> list[Request | Exception]:
        found: dict[int, Request | Exception] = {}
        collected = [_Collected(self._texts, self._vae) for _ in jobs]
        while len(found) < len(jobs):
            missing = []
            for index, (job, one) in enumerate(zip(jobs, collected, strict=True)):
                if index in found:
                    continue
                one.calls = 0
                try:
                    encode = None if self._vae.encoder is None else partial(one.pictures, job)
                    found[index] = self._request(job, one, encode)
                except _Missing:
                    missing.append(one)
                except Exception as error:
                    found[index] = error
            _answer(missing, self._texts, self._vae)
        return [found[index] for index in range(len(jobs))]

    def programs(self, job: Job, request: Request) -> list[LaneProgram]:
        """One for each image. Raises ``OutOfProfile``. Touches no lane: for any thread."""
        stepper = self._stepper
        programs = lane_programs(
            stepper.manifest, stepper.profiles, job.plan, request, range(request.n), store_estimates=job.events
        )
        for key in dict.fromkeys(programs[0].keys[programs[0].start :]):
            self.bucket(key, 1)
        return programs

    # --- lanes, on the thread of the block

    def start(self, slot: int, program: LaneProgram) -> None:
        """Writes a lane. The other slots stay as they are."""
        self._turn.run(lambda: self._stepper.start(slot, program))

    def step(self, key: StepKey, slots: Sequence[int]) -> Stopwatch:
        """One step of the lanes in ``slots``. The watch tells its time, and waits for it."""

        def work() -> Stopwatch:
            watch = self._device.stopwatch()
            watch.mark()
            self._stepper.step(key, slots)
            watch.mark()
            return watch

        return self._turn.run(work)

    def faulty(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """The slots whose latents are not finite and the step that made them so, where that is known without waiting
        for the device: on the host."""
        fault = self._stepper.host_fault
        if fault is None:
            return []
        return [(slot, int(fault[slot])) for slot in slots if fault[slot] >= 0]

    def answers(self, lanes: Iterable[tuple[int, tuple[int, int]]]) -> list[Answer]:
        """The latents of slots, each with its height and width. The slots may be written anew at once."""

        def work() -> list[Answer]:
            arena, device = self._stepper.arena, self._device
            faults = _Once(device.download_later(arena.buffers.fault))
            return [Answer(slot, device.download_later(arena.lanes(slot, 1, size)), faults) for slot, size in lanes]

        return self._turn.run(work)

    def estimate(self, job: Job, slot: int, step: int) -> Callable[[], Array]:
        """What the lane, after ``step``, is on its way to: float32 ``[1,C,h,w]``, for another thread to wait for.

        Of a job with ``events``.
        """

        def work() -> Callable[[], Array]:
            arena, device, size = self._stepper.arena, self._device, job.parsed.size
            p, q = job.plan.table.clean_estimate(step)
            stored = device.download_later(arena.estimate(step % HISTORY, slot, size))
            latents = None if p == 0 else device.download_later(arena.lanes(slot, 1, size))

            def read() -> Array:
                estimate: Array = stored.get()
                return estimate if latents is None else np.float32(p) * latents.get() + np.float32(q) * estimate

            return read

        return self._turn.run(work)

    def lost(self) -> str | None:
        """Why nothing can run on the device any more, ``None`` where something can. Asked after an error."""
        return self._device.lost()

    # --- decode

    def decode(self, latents: Array) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Pictures uint8 ``[N,H,W,C]`` of latents float32 ``[N,C,h,w]``, and which are good; the others are black."""
        return self._stage("decode", lambda: self._vae.decode_each(latents))

    def fetch(self, answer: Answer) -> tuple[Array, int]:
        """The latents and the fault of a lane. Waits for the device; for the thread that decodes."""
        return self._stage("decode", lambda: (answer.latents.get(), answer.fault()))

    # --- before it serves

    def warm_up(self, caps: Callable[[StepKey], int]) -> Iterator[tuple[TimedStep | None, float]]:
        """Records and runs each kind of step at the bundle's own size, in every batch up to ``caps``, and encoders and
        decoder. Gives what each took, and the share that is done. What the first lanes hold is lost."""
        manifest, guidable = self._stepper.manifest, self._stepper.manifest.conditioning.guidable
        plain = {name: guidable and not manifest.members[name].guidance_embedding for name in self._stepper.members}
        phases = [(name, guided) for name, halves in plain.items() for guided in (False, True)[: 1 + halves]]
        for place, (name, guided) in enumerate(phases):
            try:
                most = min(self._stepper.splitting.most(guided=guided), self.slots)
                plan = PlanOptions(schedule=name, guidance=2.0 if guided else 1.0)
                asked = synthetic_request(
                    manifest, self._backend, make_plan(manifest, plan), most, prompts=PROMPTS[:most]
                )
                job = self.job(SampleOptions(**asked, plan=plan))
                (request,) = self.encode([job])
                if isinstance(request, Exception):
                    raise request
                programs = self.programs(job, request)
            except OutOfProfile:  # the engines have no room for such steps, and requests for them are refused
                continue
            key = programs[0].keys[0]
            batches = self._batches(key, min(caps(key), most))
            for index, count in enumerate(batches):
                slots = range(count)
                for slot in slots:
                    self.start(slot, programs[slot])
                times = [self.step(key, slots).milliseconds()[0] for _ in range(min(3, len(programs[0].keys)))]
                yield TimedStep(key, count, min(times) / 1e3), (place + (index + 1) / len(batches)) / len(phases)
            if job.decode and not place:
                for count in self._batches(key, most):
                    self.decode(np.zeros((count, manifest.latent.channels, *job.parsed.size), np.float32))
                    yield None, (place + 1) / len(phases)

    def _batches(self, key: StepKey, most: int) -> list[int]:
        """Batches that differ: where steps are recorded every bucket, else powers of two and the largest."""
        counts = range(1, most + 1)
        buckets = {self.bucket(key, count) for count in counts}
        if len(buckets) == most:
            buckets = {count for count in counts if count & (count - 1) == 0} | {most}
        return sorted(min(bucket, most) for bucket in buckets)

    # --- its end

    def close(self) -> None:
        """Waits for what the stages do at the moment. Idempotent."""
        self._over = True
        self._stepper.most_keys = self._keys_before
        for lock in self._stages.values():
            with lock:
                pass

    def _stage(self, name: str, work: Callable[[], T]) -> T:
        key = object()
        with self._stages[name]:
            if self._over:
                raise Closed("this runtime is not served any more", hint="start the server again")
            try:
                EXIT.enter(key)
                with self._device.kept():
                    self._device.activate()
                    return work()
            finally:
                EXIT.inside.pop(key, None)


class _Once:
    """A download that several read."""

    def __init__(self, download: Download) -> None:
        self._download: Download | None = download
        self._found: NDArray[Any] | None = None

    def get(self) -> NDArray[Any]:
        if self._download is not None:
            self._found, self._download = self._download.get(), None
        assert self._found is not None, "it was downloaded"
        return self._found


# --- encoding many requests at once


class _Missing(Exception):
    """A request needs what was not encoded yet."""


@dataclass
class _TextCall:
    names: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass
class _PictureCall:
    pictures: Array
    tile: Any


@dataclass
class _Collected:
    """Stands for the encoders while one request is made: it answers what has been encoded, and notes what has not.

    A request is made again, with the same calls in the same order, until all of them are answered.
    """

    encoders: TextEncoders
    vae: Vae
    calls: int = 0
    asked: _TextCall | _PictureCall | None = None
    answers: list[Any] = field(default_factory=list)

    def __contains__(self, name: object) -> bool:
        return name in self.encoders

    def encode(self, names: Sequence[str], texts: Sequence[str]) -> Mapping[str, Encoded]:
        found: Mapping[str, Encoded] = self._answer(lambda: _TextCall(tuple(names), tuple(texts)))
        return found

    def pictures(self, job: Job, pictures: Array) -> tuple[Array, Array]:
        found: tuple[Array, Array] = self._answer(lambda: _PictureCall(pictures, job.tile))
        return found

    def _answer(self, call: Callable[[], _TextCall | _PictureCall]) -> Any:
        self.calls += 1
        if self.calls <= len(self.answers):
            found = self.answers[self.calls - 1]
            if isinstance(found, Exception):
                raise found
            return found
        self.asked = call()
        raise _Missing


def _answer(missing: Sequence[_Collected], texts: TextEncoders, vae: Vae) -> None:
    """Encodes what requests ask for, equal kinds together. What fails together is tried alone, one by one."""
    groups: dict[Any, list[_Collected]] = {}
    for one in missing:
        call = one.asked
        kind = call.names if isinstance(call, _TextCall) else (call.pictures.shape[1:], call.tile) if call else None
        groups.setdefault((type(call), kind), []).append(one)
    for group in groups.values():
        try:
            found = _encoded(group, texts, vae)
        except TStitchError:
            found = []
            for one in group:
                try:
                    found += _encoded([one], texts, vae)
                except TStitchError as error:
                    found.append(error)
        for one, answer in zip(group, found, strict=True):
            one.answers.append(answer)


def _encoded(group: Sequence[_Collected], texts: TextEncoders, vae: Vae) -> list[Any]:
    first = group[0].asked
    if isinstance(first, _TextCall):
        return texts.encode_each(first.names, [one.asked.texts for one in group if isinstance(one.asked, _TextCall)])
    assert isinstance(first, _PictureCall), "a call is one or the other"
    assert vae.encoder is not None, "pictures are encoded where there is an encoder"
    given = [one.asked.pictures for one in group if isinstance(one.asked, _PictureCall)]
    mean, std = vae.encoder.encode(np.concatenate(given), tile=first.tile)
    ends = np.cumsum([len(pictures) for pictures in given])[:-1]
    return list(zip(np.split(mean, ends), np.split(std, ends), strict=True))
