"""Bare times of what a step is made of: one engine call, or the step kernels, each waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

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
        stepper.synthetic(key, 0)
        stepper.bind(name, batch, guided, key.sizes)
        return self._times(stepper.engine(name).enqueue, repeats=repeats, warmup=warmup)

    def time_step_kernels(self, batch: int, *, guided: bool, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of ``repeats`` pairs of prepare and advance on ``batch`` lanes, in the first member's types."""
        stepper, device, name = self.stepper, self.device, self.stepper.members[0]
        rows = make_plan(stepper.manifest, schedule=name, guidance=1.0).rows.astype(np.float32)
        key = stepper.usual_key(name, batch, guided=guided)
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
        while len(times) < warmup + repeats:  # as long as there are rows, then from the first again
            device.upload(arena.buffers.step, np.zeros(arena.slots, np.int32))
            device.synchronize()
            times += self._times(pair, repeats=min(len(rows), warmup + repeats - len(times)), warmup=0)
        return times[warmup:]

    def _times(self, work: Callable[[], None], *, repeats: int, warmup: int) -> list[float]:
        for _ in range(warmup):
            work()
        self.device.synchronize()
        times = []
        for _ in range(repeats):
            start = perf_counter()
            work()
            self.device.synchronize()
            times.append(1e3 * (perf_counter() - start))
        return times
