"""The runtime: walks a plan over loaded engines while the latents stay in one arena."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import ComponentName, Manifest
from tstitch_engines.checks import (
    Check,
    check_callable,
    check_choice,
    check_switch,
    check_text,
    check_whole,
    checked,
    optional,
    taken_as_is,
)
from tstitch_engines.closing import do_all
from tstitch_engines.device.base import Buffer, Device
from tstitch_engines.errors import BadInput, Busy, Cancelled, FailedWork, NotFinite, first_line, unknown_name
from tstitch_engines.trace import span
from tstitch_trt.plan.options import PlanKeywords, PlanOptions
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.request.arrays import ForeignLatents
from tstitch_trt.request.batching import Splitting
from tstitch_trt.request.init_image import Encode
from tstitch_trt.request.limits import MOST_IMAGES, Limits, check_prompt
from tstitch_trt.request.options import SampleKeywords, SampleOptions
from tstitch_trt.request.parse import parse_request
from tstitch_trt.request.request import Request
from tstitch_trt.request.text import Texts
from tstitch_trt.runtime.chooser import ChooserFactory, ChosenSchedule, Setup, check_budget, choose
from tstitch_trt.runtime.component import Component
from tstitch_trt.runtime.job import OUTPUTS, Job, Output
from tstitch_trt.runtime.lane_runner import LaneRunner
from tstitch_trt.runtime.lora import LoraFiles, Loras, local_loras
from tstitch_trt.runtime.result import FailedImage, Result, StepEvent
from tstitch_trt.runtime.step_graphs import GraphMode, GraphState
from tstitch_trt.runtime.stepper import Stepper
from tstitch_trt.runtime.text_encoder import PromptLength, TextEncoders
from tstitch_trt.runtime.timing import StepTimer
from tstitch_trt.runtime.trajectory import PendingChunk, ResultCollector, Trajectory
from tstitch_trt.runtime.vae import Tile, Vae, check_tile
from tstitch_trt.runtime.work_queue import EXIT, Turn, WorkQueue, check_timeout

__all__ = ["Runtime"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

Callback = Callable[[StepEvent], object]


# --- the checks of arguments; what a request asks for is checked by its records

_NAME: Final = partial(check_text, example="large", most=1000)
_BATCH: Final = partial(check_whole, low=1, high=MOST_IMAGES)
MOST_REPEATS: Final = 100_000
MOST_LANES: Final = 4096
_HOW: Final[Mapping[str, Check]] = {
    "decode": optional(check_switch),
    "output": partial(check_choice, allowed=OUTPUTS),
    "tile": check_tile,
    "latency_budget_ms": optional(check_budget),
    "partial": check_switch,
    "timeout": check_timeout,
}


class Runtime:
    """Loaded engines of one bundle on one device. Made by ``tstitch_trt.load``.

    Any thread may call it. It works on one call at a time, in the order of the calls; one that has waited for
    ``timeout`` seconds, by default those given to ``load``, raises ``Busy``. What tells of the runtime (``memory``,
    ``graphs``, ``loras``...) waits for nobody. Arrays that are given are copied when the call is made, and what is
    returned is the caller's own. Use it as a context manager, or call ``close``: every call that needs engines then
    raises ``Closed``. Runtimes that are open when the interpreter ends are closed with ``cancel``; a daemon thread
    that is in a call then ends by ``SystemExit``, without a word.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        backend_name: str,
        engines: Mapping[str, Engine],
        load_ms: float,
        *,
        graph: GraphMode = "auto",
        places: Mapping[str, Device] | None = None,
        threads: int = 0,
        chooser: ChooserFactory | None = None,
        timeout: float | None = None,
    ) -> None:
        """``places``: what the engines of encoders and decoder were loaded on, if not on ``device``
        (``Device.with_own_stream``). The other options are those of ``tstitch_trt.load``.
        """
        self.bundle = bundle
        self.device = device
        self.backend_name = backend_name
        self.load_ms = load_ms
        self.threads = threads
        self._engines = dict(engines)
        members, control = bundle.manifest.members, ComponentName.CONTROLNET
        stepped = {name: engine for name, engine in engines.items() if name in members or name == control}
        self._stepper = Stepper(bundle.manifest, device, stepped, graph)
        self._parts = {
            name: Component(name, network, engines[name], (places or {}).get(name, device))
            for name, network in bundle.manifest.parts.items()
            if name in engines and name not in stepped
        }
        self._texts = TextEncoders.of(bundle, self._parts)
        self._vae = Vae(bundle.manifest, self._parts)
        self._loras = Loras(bundle, backend_name, self._engines, self._stepper.forget)
        self._timer = StepTimer(self._stepper, device)
        self._chooser = None if chooser is None else chooser(bundle, self.setup)
        self._queue = WorkQueue(device, timeout)
        _OPEN.add(self)

    # --- what it is

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def batch_limit(self) -> int:
        """Images per engine call when unguided; half of it when guided."""
        return self._stepper.batch_limit

    @property
    def splitting(self) -> Splitting:
        """How the images of a request become chunks, each of one engine call."""
        return self._stepper.splitting

    @property
    def limits(self) -> Limits:
        """The sizes that all members can run."""
        return self._stepper.limits

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, in the bundle's order: ``fraction`` goes from the first to the last."""
        return self._stepper.members

    @checked(prompt=check_prompt)
    def prompt_length(self, prompt: str) -> PromptLength | None:
        """The tokens of ``prompt``, and how many fit; ``None`` for a bundle without a text encoder.

        Runs no engine. Raises ``Unavailable`` without the library ``tokenizers``.
        """
        return self._texts.length(prompt, self.limits.most_tokens)

    @property
    def setup(self) -> Setup:
        """Backend, device, threads and graph mode."""
        return Setup(self.backend_name, self.device.name, self.threads, self._stepper.graph_state().mode)

    @property
    def loras(self) -> dict[str, str]:
        """Those that ``swap_lora`` put in, by network: ``{"large": "style.safetensors:0.8"}``."""
        return self._loras.to_dict()

    def memory(self) -> dict[str, int]:
        """Bytes on the device by purpose: ``arena``, ``engine io``, ``activations`` and ``parts io``.

        ``activations`` are those that engines plan themselves (TensorRT: one block for all that run one after another,
        and one for the VAE's decoder, which runs beside them). ``parts io``: of text encoders and VAE, where there are
        any. What a library allocates on its own, the weights, and results that were left on the device are not in it.
        """
        return self._queue.read(self._memory)

    def _memory(self) -> dict[str, int]:
        scratch: dict[int, int] = {}
        for engine in self._engines.values():
            scratch |= engine.scratch()
        found = {**self._stepper.memory(), "activations": sum(scratch.values())}
        return {**found, "parts io": sum(part.nbytes for part in self._parts.values())} if self._parts else found

    def jit_ms(self) -> dict[str, float]:
        """Milliseconds that each engine has spent so far on compiling for this machine, when a batch size was new.

        Of TensorRT-RTX, and of the backend ``torch`` built with the option ``compile``; elsewhere 0.
        """
        return self._queue.read(lambda: {name: engine.jit_ms for name, engine in self._engines.items()})

    def graphs(self) -> GraphState:
        """Whether steps are replayed from graphs, why, and what could not be recorded so far."""
        return self._queue.read(self._stepper.graph_state)

    @checked(cancel=check_switch, timeout=check_timeout)
    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Releases graphs and engines, after the request that runs, or with ``cancel`` after its present step.

        Requests that are cancelled raise ``Cancelled``, those that wait for their turn ``Closed``. A request of the
        calling thread itself, in whose callback or loop this is called, is always cancelled. Results stay as they are.
        Where the device fails, everything is let go of as well, and then ``FailedWork`` is raised.

        ``timeout``: seconds to wait for the request that runs, by default for ever. ``Busy`` is raised after them; the
        runtime then takes no requests, and is closed by another call.
        """
        self._queue.close(self._free, cancel=cancel, timeout=timeout)
        _OPEN.discard(self)

    def _free(self) -> None:
        with self.device.kept():
            do_all(self.device.activate, self._stepper.close, *(part.close for part in self._parts.values()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close(cancel=error is not None)
        except FailedWork as failed:
            if error is None:
                raise
            _log.warning("%s: closing it: %s", self.manifest.name, failed.message)  # the error is what matters

    # --- sampling

    def plan(self, **keywords: Unpack[PlanKeywords]) -> Plan:
        """The plan of a request, without running it. ``keywords``: see ``tstitch_trt.plan.options.PlanOptions``."""
        return make_plan(self.manifest, PlanOptions.from_keywords(keywords))

    @checked(others=True, latency_budget_ms=check_budget)
    def within_budget(self, latency_budget_ms: float, **keywords: Unpack[SampleKeywords]) -> ChosenSchedule:
        """The best schedule for a request that takes at most ``latency_budget_ms``; ``sample`` takes it as well.

        ``keywords``: the request as ``sample`` gets it, without ``schedule``, ``fraction`` and ``rounding``; what it
        fixes besides (steps, solver, guidance...) stays so, and the rest is chosen. The budget is for
        ``Result.total_ms``, the trajectories of all its images: reading prompts and making pictures of latents is no
        part of it.

        Cost comes from this machine's calibration (``tstitch-trt calibrate``), quality from the newest search,
        evaluation or profile of the bundle that covers the request, else T-Stitch's rule decides. Raises
        ``NotCalibrated``, ``BadInput`` for a budget that nothing meets, naming the nearest one that is met, and
        ``Unavailable`` where the runtime was loaded without a chooser.
        """
        options = SampleOptions.from_keywords(keywords)
        parsed = parse_request(self.manifest, self.limits, options)
        return choose(self._chooser, self.manifest, latency_budget_ms, options.plan, parsed)

    @checked(others=True, callback=optional(check_callable), **_HOW)
    def sample(
        self,
        *,
        callback: Callback | None = None,
        decode: bool | None = None,
        output: Output = "host",
        tile: Tile = "auto",
        latency_budget_ms: float | None = None,
        partial: bool = False,
        timeout: float | None = None,
        **keywords: Unpack[SampleKeywords],
    ) -> Result:
        """Draws images.

        ``keywords``: what the images are to be (``tstitch_trt.request.options.SampleOptions``: labels or prompt, n,
        seed, size, a picture to start from...) and how they are drawn (``tstitch_trt.plan.options.PlanOptions``: steps,
        solver, schedule, fraction, guidance...). ``callback`` gets a ``StepEvent`` after each step and cancels by
        returning ``False``.

        ``decode``: whether to make pictures; by default where the bundle has a decoder. ``output="device"`` leaves the
        latents on the device, as ``Result.device_latents``, and makes no pictures. ``tile``: how the VAE takes them,
        and those to start from (``tstitch_trt.runtime.vae.Tile``).

        ``latency_budget_ms``: the best schedule whose trajectories take at most so long, in place of ``schedule`` or
        ``fraction`` (``within_budget``); ``Result.budget`` says what was chosen and why.

        ``partial``: an image whose latents or picture become NaN does not end the request. ``Result.failed`` says
        which, at which step and by which member; the others are, bit for bit, what they are without it.

        ``timeout``: seconds to wait for calls that came before, by default those given to ``load``. The callback may
        call ``decode``, ``images`` and ``encode``, which are done between the steps.

        Images larger in number than the engines' batch profile run in chunks. Raises ``BadInput`` and its kinds for a
        request that can't be right, ``Cancelled``, ``Busy`` and ``Closed``; ``NotFinite`` with step and member, which
        has the images of the chunks that were done, and with ``partial`` only if all images failed.
        """
        job = self._job(
            keywords,
            decode=decode,
            output=output,
            tile=tile,
            events=callback is not None,
            within=latency_budget_ms,
            partial=partial,
        )
        events = self._run(job, self._queue.new(), timeout)
        try:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    result: Result = stop.value
                    return result
                if callback is not None and callback(event) is False:
                    raise Cancelled(
                        f"cancelled by the callback after step {event.step} of {event.steps}",
                        hint="return anything but False from the callback to go on",
                    )
        finally:
            events.close()  # a callback's exception keeps this frame, and with it the iterator, as long as it is kept

    @checked(others=True, **_HOW)
    def iterate(
        self,
        *,
        decode: bool | None = None,
        output: Output = "host",
        tile: Tile = "auto",
        latency_budget_ms: float | None = None,
        partial: bool = False,
        timeout: float | None = None,
        **keywords: Unpack[SampleKeywords],
    ) -> Generator[StepEvent, None, Result]:
        """Like ``sample``, as a generator of ``StepEvent``; its return value is the ``Result``. Close it to cancel.

        The call checks the request; the first ``next`` encodes it. From there until it ends, is closed or dropped, it
        has the runtime to itself: other threads wait, and another request of the same thread raises ``Busy``. Any
        thread may close it: a step that runs is the last one.
        """
        job = self._job(
            keywords,
            decode=decode,
            output=output,
            tile=tile,
            events=True,
            within=latency_budget_ms,
            partial=partial,
        )
        turn = self._queue.new()
        return _Steps(self._run(job, turn, timeout), lambda why: self._queue.cancel(turn, why))

    # --- parts of it

    @checked(latents=taken_as_is, tile=check_tile, timeout=check_timeout)
    def decode(
        self, latents: NDArray[np.float32], *, tile: Tile = "auto", timeout: float | None = None
    ) -> NDArray[np.uint8]:
        """Latents float32 ``[N,C,H,W]`` to pictures uint8 ``[N,H,W,C]``. Raises ``Unavailable`` without a decoder.

        ``tile``: see ``tstitch_trt.runtime.vae.Tile``.
        """
        given = self._vae.latents(latents)
        return self._queue.do(lambda: self._vae.decode(given, tile=tile), timeout, between_steps=True)

    @checked(latents=taken_as_is, tile=check_tile, timeout=check_timeout)
    def images(
        self, latents: NDArray[np.float32], *, tile: Tile = "auto", timeout: float | None = None
    ) -> NDArray[np.float32]:
        """Like ``decode``, as float32 ``[N,C,H,W]`` in about [-1, 1], neither clamped nor rounded."""
        given = self._vae.latents(latents)
        return self._queue.do(lambda: self._vae.images(given, tile=tile), timeout, between_steps=True)

    @checked(pictures=taken_as_is, tile=check_tile, timeout=check_timeout)
    def encode(
        self, pictures: NDArray[np.float32], *, tile: Tile = "auto", timeout: float | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pictures float32 ``[N,3,H,W]`` in [-1, 1] to mean and standard deviation of their latents ``[N,C,h,w]``.

        Raises ``Unavailable`` without an encoder.
        """
        given = self._vae.pictures(pictures)
        return self._queue.do(lambda: self._vae.encode(given, tile=tile), timeout, between_steps=True)

    @checked(
        name=_NAME,
        batch=_BATCH,
        guided=check_switch,
        repeats=partial(check_whole, low=1, high=MOST_REPEATS),
        warmup=partial(check_whole, high=MOST_REPEATS),
        timeout=check_timeout,
    )
    def time_member(
        self,
        name: str,
        batch: int,
        *,
        guided: bool = False,
        repeats: int = 20,
        warmup: int = 3,
        timeout: float | None = None,
    ) -> list[float]:
        """Milliseconds of ``repeats`` bare engine calls on ``batch`` lanes of the bundle's own latents."""
        if name not in self.members:
            raise unknown_name("member", name, self.members)
        timed = partial(self._timer.time_member, name, batch, guided=guided, repeats=repeats, warmup=warmup)
        return self._queue.do(timed, timeout)

    @checked(
        batch=_BATCH,
        guided=check_switch,
        repeats=partial(check_whole, low=1, high=MOST_REPEATS),
        warmup=partial(check_whole, high=MOST_REPEATS),
        timeout=check_timeout,
    )
    def time_step_kernels(
        self,
        batch: int,
        *,
        guided: bool = False,
        repeats: int = 100,
        warmup: int = 10,
        timeout: float | None = None,
    ) -> list[float]:
        """Milliseconds of ``repeats`` pairs of prepare and advance on ``batch`` lanes, in the first member's types."""
        timed = partial(self._timer.time_step_kernels, batch, guided=guided, repeats=repeats, warmup=warmup)
        return self._queue.do(timed, timeout)

    # --- LoRAs, and several calls in a row

    @checked(name=_NAME, files=taken_as_is, timeout=check_timeout)
    def swap_lora(self, name: str, files: LoraFiles, *, timeout: float | None = None) -> None:
        """Puts LoRAs into a member or text encoder, in place of those that an earlier call put there.

        They are there for the requests of all threads; ``lora`` is for those of one. ``files``:
        ``"style.safetensors:0.8,lcm.safetensors"``, a path, or a list of paths and ``(path, weight)``. In a text
        ``ORG/NAME`` may stand for a file, a Hugging Face repository; it is downloaded while others use the runtime. For
        engines that can be refitted: of the backend ``torch``, and of TensorRT built with ``--option refit=true``.
        Raises ``BadCheckpoint`` for a LoRA for another model and ``BadInput`` where engines can't; whatever it raises,
        the network has the weights that it had before.
        """
        self._queue.check_open()
        self._queue.do(partial(self._loras.swap, name, local_loras(files)), timeout)

    @checked(name=optional(_NAME), timeout=check_timeout)
    def restore(self, name: str | None = None, *, timeout: float | None = None) -> None:
        """Takes out what ``swap_lora`` put into a network, or into any: the bundle's own weights, bit for bit."""
        self._queue.do(partial(self._loras.restore, name), timeout)

    @contextmanager
    @checked(name=_NAME, files=taken_as_is, timeout=check_timeout)
    def lora(self, name: str, files: LoraFiles, *, timeout: float | None = None) -> Iterator[Self]:
        """``swap_lora`` for an ``exclusive`` block: for no other thread. Afterwards what was there before is back."""
        self._queue.check_open()
        local = local_loras(files)
        with self._queue.exclusive(timeout) as turn:
            before = turn.run(partial(self._loras.current, name))
            turn.run(partial(self._loras.swap, name, local))
            try:
                yield self
            finally:
                self._queue.end_inner(turn)
                with suppress(Cancelled):  # the runtime was closed in the block: the engine is gone
                    turn.run(partial(self._loras.put, name, before))

    @contextmanager
    @checked(timeout=check_timeout)
    def exclusive(self, *, timeout: float | None = None) -> Iterator[Self]:
        """A ``with`` block that has the runtime to itself: the calls of this thread are done, those of others wait.

        An iterator that is still open at its end is cancelled.
        """
        with self._queue.exclusive(timeout):
            yield self

    @contextmanager
    @checked(slots=optional(partial(check_whole, low=1, high=MOST_LANES)), timeout=check_timeout)
    def lanes(self, slots: int | None = None, *, timeout: float | None = None) -> Iterator[LaneRunner]:
        """An ``exclusive`` block that runs lanes of many requests step by step: what ``tstitch_trt.serve`` is built on.

        ``slots``: how many lanes there are at once; by default, and at least, as many as one batch has. Raises
        ``BadInput`` on CUDA for a bundle with encoders or a decoder that was loaded without ``overlap``.
        """
        if self.device.name != "cpu" and any(part.device is self.device for part in self._parts.values()):
            raise BadInput(
                "encoders and decoder share the stream of the steps, which several threads can't use at once",
                hint="load the bundle with overlap=True, the default",
            )
        with self._queue.exclusive(timeout) as turn:
            turn.run(lambda: self._stepper.resize(self.batch_limit if slots is None else slots))
            make = partial(Job.make, self.manifest, self.limits, self._vae, self._chooser)
            parts = (self._stepper, self.device, self._texts, self._vae)
            runner = LaneRunner(*parts, make, self._request, turn, self.backend_name)
            turn.drop = runner.close
            try:
                yield runner
            finally:
                runner.close()

    # --- how

    def _job(self, keywords: SampleKeywords, **how: Unpack[_HowKeywords]) -> Job:
        """Checks what can be checked before an engine runs."""
        self._queue.check_open()
        with span("plan"):
            options = SampleOptions.from_keywords(keywords)
            return Job.make(self.manifest, self.limits, self._vae, self._chooser, options, **how)

    def _request(self, job: Job, texts: Texts, encode: Encode | None) -> Request:
        """Encodes prompts and pictures."""
        self._loras.check()
        parsed = job.parsed
        if isinstance(parsed.latents, ForeignLatents):
            parsed = replace(parsed, latents=parsed.latents.read(self.device.borrow(parsed.latents.value)))
        return Request.make(self.manifest, parsed, job.plan, texts=texts, encode=encode)

    def _run(self, job: Job, turn: Turn, timeout: float | None) -> Generator[StepEvent, None, Result]:
        """One turn, in which the request is encoded and its chunks run."""
        steps = self._chunks(turn, job)
        turn.drop = steps.close
        try:
            self._queue.begin(turn, timeout)
            while True:
                event = turn.next_step(lambda: next(steps))
                yield replace(event, _read=partial(turn.after, turn.step))
        except StopIteration as stop:
            result: Result = stop.value
            return result
        finally:
            try:
                with turn.mutex:  # nobody is reading an event after this
                    turn.drop()
            finally:
                turn.over = True
                self._queue.end(turn)

    def _chunks(self, turn: Turn, job: Job) -> Generator[StepEvent, None, Result]:
        """A chunk is collected and decoded after the next one was enqueued: on CUDA the two overlap."""
        with span("encode request"):
            request = self._request(job, self._texts, self._vae.encoding(job.tile))
        each = partial(self._vae.decode_each, tile=job.tile)
        trajectory = Trajectory(
            self._stepper,
            self.device,
            request,
            job.plan,
            decode=(lambda latents: each(latents)[0]) if job.partial else partial(self._vae.decode, tile=job.tile),
            events=job.events,
            partial=job.partial,
            check=turn.check,
        )
        shape = (request.n, self.manifest.latent.channels, *request.size)
        kept = self.device.empty(shape, "float32") if job.output == "device" else None
        host, decode = None if kept is not None else shape, each if job.decode else None
        found = ResultCollector(trajectory, request.seeds, host, decode, partial=job.partial)
        before: PendingChunk | None = None
        try:
            for chunk in trajectory.chunks():
                target = None
                if kept is not None:
                    offset = chunk.start * kept.nbytes // request.n
                    target = self.device.view(kept, offset, (chunk.count, *shape[1:]), "float32")
                pending = yield from trajectory.run(chunk, target)
                before, done = pending, before
                if done is not None:
                    found.add(done)
            assert before is not None, "a request has at least one image"
            last, before = before, None
            found.add(last)
        except NotFinite as error:
            if before is not None:
                with suppress(NotFinite):
                    found.add(before)
            result = self._result(job, request, found, kept, error.failed)
            error.result = result if result.drawn else None
            raise
        finally:
            trajectory.end_spans()
        return self._result(job, request, found, kept)

    def _result(
        self,
        job: Job,
        request: Request,
        found: ResultCollector,
        kept: Buffer | None,
        failed: Sequence[FailedImage] = (),
    ) -> Result:
        """``failed``: images besides those that ``found`` knows of."""
        return Result(
            found.pictures(),
            found.latents,
            request.seeds,
            request.labels,
            job.plan,
            tuple(found.timings),
            None if kept is None else self.device.share(kept),
            prompts=request.prompts,
            loras=self._loras.to_dict(),
            budget=job.budget,
            failed=found.failed(failed),
        )


class _HowKeywords(TypedDict):
    decode: bool | None
    output: Output
    tile: Tile
    events: bool
    within: float | None
    partial: bool


def _iterator_closed() -> Cancelled:
    return Cancelled("its iterator was closed by another thread", hint="nothing to do: the runtime is free")


class _Steps(Generator[StepEvent, None, Result]):
    """What ``iterate`` returns: the generator ``events``, which any thread may close."""

    def __init__(self, events: Generator[StepEvent, None, Result], cancel: Callable[[str], None]) -> None:
        self._events = events
        self._cancel = cancel
        self._closed = False

    def __next__(self) -> StepEvent:
        return self.send(None)

    def send(self, value: None) -> StepEvent:
        try:
            event = self._go(lambda: self._events.send(value))
            if not self._closed:
                return event
            self.close()  # for another thread, which could not end the generator in the middle of this
            raise _iterator_closed()
        except KeyboardInterrupt:  # raised here or inside: its traceback may be kept, and this object with it
            self.close()
            raise

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> StepEvent:
        error = typ if val is None else val
        return self._go(lambda: self._events.throw(error))

    def close(self) -> None:
        self._closed = True  # first: either the generator can be closed here, or `send` sees this
        try:
            self._go(self._events.close)
        except Busy:
            self._cancel(_iterator_closed().message)

    def _go(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except ValueError as error:
            if str(error) != "generator already executing":
                raise
            if self._closed and call != self._events.close:
                raise _iterator_closed() from None
            raise Busy(
                "another call goes on with this iterator, or waits for the runtime on its behalf",
                hint="go on with it from one thread at a time; close() may be called at any time",
            ) from None


_OPEN: Final[WeakSet[Runtime]] = WeakSet()


def _forget_all() -> None:
    """In a fork, where no other thread is left, in an engine or out of it."""
    _OPEN.clear()
    EXIT.inside.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@atexit.register
def _close_all() -> None:
    """Before the interpreter stops daemon threads, which would abort the process where one is inside an engine."""
    EXIT.begin()
    for runtime in list(_OPEN):
        try:
            runtime.close(cancel=True)
        except Exception as error:  # the others are to be closed too
            _log.warning("%s: closing it: %s", runtime.manifest.name, first_line(error))
    EXIT.wait()
