"""Bare times of what a step is made of, engine calls and step kernels, launched as trajectories launch their steps.

Where steps are recorded, what is timed is replayed from a graph of its own, else it is enqueued call by call. Many in a
row, with marks in the device's queue: nothing waits between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from tstitch_engines.device.base import Device
from tstitch_engines.errors import first_line
from tstitch_engines.spec import storage_dtype
from tstitch_engines.trace import Arg, Trace, current_trace, span
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.runtime.lane_program import LaneProgram
from tstitch_trt.runtime.stepper import Stepper

__all__ = ["DeviceSpans", "StepTimer"]

_log = logging.getLogger(__name__)


class DeviceSpans:
    """Times of the device's work for a trace, from marks in its queue. Not run on a GPU.

    The clock of the host and that of the device are set against each other once, in ``__init__``, which waits: times on
    the device's track are right among themselves, and against the host's by the few microseconds a mark takes.
    """

    @staticmethod
    def of(device: Device) -> DeviceSpans | None:
        """``None`` where no trace is recorded, and on the CPU, whose work is in the host's spans."""
        trace = current_trace()
        return None if trace is None or device.name == "cpu" else DeviceSpans(device, trace)

    def __init__(self, device: Device, trace: Trace) -> None:
        self._trace = trace
        self._track = device.name
        self._marks: list[tuple[str, dict[str, Arg]] | None] = []
        self._watch = device.stopwatch()
        device.synchronize()
        self._start = perf_counter_ns()
        self._watch.mark()

    def mark(self, name: str | None, **args: Arg) -> None:
        """What was enqueued since the mark before is the span ``name``, or with ``None`` is not shown."""
        self._watch.mark()
        self._marks.append(None if name is None else (name, args))

    def end(self) -> None:
        """Waits for the last mark and adds the spans to the trace. Where the device fails it says so in the log."""
        try:
            times = self._watch.milliseconds()
        except Exception as error:  # of the device's library; the request raises it too, where it matters
            _log.warning("the trace lacks the times of %s: %s", self._track, first_line(error))
            return
        end = float(self._start)
        for marked, ms in zip(self._marks, times, strict=True):
            start, end = end, end + 1e6 * ms
            if marked is not None:
                self._trace.add(self._track, marked[0], round(start), round(end), marked[1])


@dataclass(frozen=True)
class StepTimer:
    """Times the parts of a step. It overwrites what arena and engine buffers hold."""

    stepper: Stepper
    device: Device

    def time_member(self, name: str, batch: int, *, guided: bool, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of ``repeats`` bare engine calls on ``batch`` lanes of the bundle's own latents."""
        stepper = self.stepper
        key = stepper.usual_key(name, batch, guided=guided)
        stepper.ready([key])
        stepper.synthetic(key, 0)
        stepper.bind(name, batch, guided, key.sizes)
        engine = stepper.engine(name)
        with (
            span("bare engine calls", member=name, calls=warmup + repeats, lanes=batch, guided=guided),
            self._launches(engine.enqueue, recorded=stepper.recorded(key), uploads=engine.keeps_uploads) as launch,
        ):
            return self._times(launch, warmup + repeats)[warmup:]

    def time_step_kernels(self, batch: int, *, guided: bool, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of ``repeats`` pairs of prepare and advance on ``batch`` lanes, in the first member's types."""
        stepper, device, name = self.stepper, self.device, self.stepper.members[0]
        rows = make_plan(stepper.manifest, schedule=name, guidance=1.0).rows.astype(np.float32)
        key = stepper.usual_key(name, batch, guided=guided)
        stepper.ready([key])
        bound = stepper.bind(name, batch, guided, key.sizes)
        output = bound.model_output
        assert output is not None, "members have a model_output"
        device.upload(output, np.zeros(output.shape, storage_dtype(output.dtype)))
        arena = stepper.arena
        arena.write(0, [LaneProgram(rows, 0, 0, (key,) * len(rows))] * batch)
        stepper.activate(range(batch), batch)
        kernels = arena.kernels(stepper.latent_shape(key))

        def pair() -> None:
            kernels.prepare(bound.active, bound.sample, bound.timestep, guided=guided)
            kernels.advance(bound.active, output, guided=guided, rescale=False)

        times: list[float] = []
        with (
            span("bare step kernels", calls=warmup + repeats, lanes=batch, guided=guided),
            self._launches(pair, recorded=stepper.recorded(key)) as launch,
        ):
            while len(times) < warmup + repeats:  # as long as there are rows, then from the first again
                device.upload(arena.buffers.step, np.zeros(arena.slots, np.int32))
                times += self._times(launch, min(len(rows), warmup + repeats - len(times)))
        return times[warmup:]

    @contextmanager
    def _launches(
        self, work: Callable[[], None], *, recorded: bool, uploads: bool = False
    ) -> Iterator[Callable[[], None]]:
        """What does ``work`` once: itself, or the launch of a graph of it. ``uploads``: see ``Device.capture``."""
        device = self.device
        device.synchronize()
        if not recorded:
            yield work
            return
        graph = device.capture(work, uploads=uploads)
        try:
            yield graph.launch
        finally:
            graph.close()

    def _times(self, launch: Callable[[], None], count: int) -> list[float]:
        watch = self.device.stopwatch()
        watch.mark()
        for _ in range(count):
            launch()
            watch.mark()
        return watch.milliseconds()
