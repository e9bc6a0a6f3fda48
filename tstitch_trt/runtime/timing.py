"""Bare times of what a step is made of, engine calls and step kernels, launched as trajectories launch their steps.

Where steps are recorded, what is timed is replayed from a graph of its own, else it is enqueued call by call. Many in a
row, with marks in the device's queue: nothing waits between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tstitch_engines.device.base import Device
from tstitch_engines.spec import storage_dtype
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.runtime.lane_program import LaneProgram
from tstitch_trt.runtime.stepper import Stepper

__all__ = ["StepTimer"]


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
        with self._launches(engine.enqueue, recorded=stepper.recorded(key), uploads=engine.keeps_uploads) as launch:
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
        with self._launches(pair, recorded=stepper.recorded(key)) as launch:
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
