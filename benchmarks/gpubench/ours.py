"""This package as a contender: bare engines, trajectories, host time, traces and memory of one loaded bundle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpubench.cases import DitCase
from gpubench.models import SETTINGS
from gpubench.record import Entry, spread_of
from gpubench.trace import traced
from gpubench.trajectories import RuntimeTrajectory
from tstitch_engines.device.base import NotCaptured
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.conditioning import class_values
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey
from tstitch_trt.runtime.runtime import Runtime

__all__ = ["OurTrajectory"]


class OurTrajectory(RuntimeTrajectory):
    """Reaches into the runtime's stepper for what users never need: engines replayed alone, steps without a request."""

    def __init__(self, runtime: Runtime, case: DitCase, noise: NDArray[np.float32], labels: list[int]) -> None:
        super().__init__(runtime, noise, labels, steps=case.steps, **SETTINGS)
        self.device = runtime.device
        self.case = case
        self._stepper = runtime._stepper
        values = class_values(runtime.manifest, labels)
        self._rows = [values.row(image) for image in range(case.batch)]

    # --- times

    def measure(self, rounds: int) -> Entry:
        """In every round each fraction's trajectory has as many bare engine calls around it as it has steps."""
        plans = {f: self.runtime.plan(steps=self.case.steps, fraction=f, **SETTINGS) for f in self.case.fractions}
        bare = {name: self._bare(name) for name in self.runtime.members}
        means: dict[str, list[float]] = {name: [] for name in bare}
        found: dict[float, dict[str, list[float]]] = {f: {"wall": [], "device": [], "bare": []} for f in plans}
        for index in range(rounds + 1):  # the first warms up
            for fraction, plan in plans.items():
                counts = {name: plan.schedule.names.count(name) for name in set(plan.schedule.names)}
                before = {name: bare[name]((n + 1) // 2) for name, n in counts.items()}
                start = time.perf_counter()
                result = self.walk(fraction)
                wall = 1e3 * (time.perf_counter() - start)
                after = {name: bare[name](n // 2) for name, n in counts.items()}
                if index == 0:
                    continue
                for name, n in counts.items():
                    means[name].append((before[name] + after[name]) / n)
                found[fraction]["wall"].append(wall)
                found[fraction]["device"].append(result.total_ms)
                found[fraction]["bare"].append(sum(before.values()) + sum(after.values()))
        step_ms = {name: statistics.median(values) for name, values in means.items() if values}
        return {
            "members": {name: spread_of(values) for name, values in means.items() if values},
            "trajectories": [
                self._summary(fraction, plans[fraction], values, step_ms) for fraction, values in found.items()
            ],
        }

    def _summary(self, fraction: float, plan: Plan, values: dict[str, list[float]], step_ms: dict[str, float]) -> Entry:
        predicted = sum(step_ms[name] for name in plan.schedule.names)
        pairs = list(zip(values["device"], values["bare"], strict=True))
        return {
            "fraction": fraction,
            "schedule": plan.schedule.text,
            "wall_ms": spread_of(values["wall"]),
            "device_ms": spread_of(values["device"]),
            "predicted_ms": predicted,
            "measured_over_predicted": statistics.median(values["device"]) / predicted,
            "overhead": spread_of([device / bare for device, bare in pairs]),
        }

    def _bare(self, name: str) -> Callable[[int], float]:
        """Milliseconds of n engine calls in a row, by marks in the device's queue; replays where it can be recorded."""
        engine = self._stepper._engines[name]
        lanes = self.case.batch
        key = self._stepper.usual_key(name, lanes, guided=True)
        self._stepper.synthetic(key, 0)
        self._stepper.bind(name, lanes, True, key.sizes)
        for _ in range(engine.warmups):
            engine.enqueue()
        self.device.synchronize()
        launch: Callable[[], None] = engine.enqueue
        if self.runtime.graphs().mode != "off" and not engine.obstacle:
            try:
                launch = self.device.capture(engine.enqueue, uploads=engine.keeps_uploads).launch
            except NotCaptured:
                launch = engine.enqueue

        def calls(count: int) -> float:
            if not count:
                return 0.0
            self._stepper.bind(name, lanes, True, key.sizes)
            self.device.synchronize()
            watch = self.device.stopwatch()
            watch.mark()
            for _ in range(count):
                launch()
            watch.mark()
            return watch.milliseconds()[0]

        return calls

    def kernels(self, pairs: int = 200) -> Entry:
        """Milliseconds of one ``prepare`` and ``advance``, enqueued back to back."""
        plan = self.runtime.plan(steps=self.case.steps, fraction=0.0, **SETTINGS)
        arena, lanes = self._stepper.arena, self.case.batch
        key = self._stepper.usual_key(self.runtime.members[0], lanes, guided=True)
        bound = self._stepper.bind(key.member, lanes, True, key.sizes)
        kernels = arena.kernels(self._stepper.latent_shape(key))
        self._stepper.activate(range(lanes), lanes)
        assert bound.model_output is not None, "a member has one"
        rows = np.resize(plan.rows, (min(pairs, arena.table_rows), plan.rows.shape[1])).astype(np.float32)
        times = []
        for _ in range(5):
            arena.write(0, [LaneProgram(rows, 0, 0, (key,) * len(rows))] * lanes)
            self.device.synchronize()
            watch = self.device.stopwatch()
            watch.mark()
            for _ in range(len(rows)):
                kernels.prepare(bound.active, bound.sample, bound.timestep, guided=True)
                kernels.advance(bound.active, bound.model_output, guided=True, rescale=False)
            watch.mark()
            times.append(watch.milliseconds()[0] / len(rows))
        return {"pair_ms": spread_of(times[1:])}

    # --- what the host does

    def host(self, fraction: float, steps: int) -> Entry:
        """Microseconds of host time per step while the device lags behind, and what a profiler sees of the steps."""
        run = self._steps(fraction, steps)
        run()
        self.device.synchronize()
        times = []
        for _ in range(5):
            self._start(fraction, steps)
            self.device.synchronize()
            start = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - start) / steps)
            self.device.synchronize()
        found: Entry = {"graphs": msgspec.to_builtins(self.runtime.graphs())}
        if self.device.name == "cpu":
            found["host_us_per_step"] = None
            found["reason"] = "on the CPU the host is the engine"
            return found
        found["host_us_per_step"] = spread_of(times)
        self._start(fraction, steps)
        found["trace"] = traced(run, self.device.synchronize)
        return found

    def _kinds(self, fraction: float, steps: int) -> list[StepKey]:
        plan = self.runtime.plan(steps=steps, fraction=fraction, **SETTINGS)
        return [
            self._stepper.usual_key(name, self.case.batch, guided=guided)
            for name, guided in zip(plan.schedule.names, plan.guided, strict=True)
        ]

    def _start(self, fraction: float, steps: int) -> None:
        plan = self.runtime.plan(steps=steps, fraction=fraction, **SETTINGS)
        rows, keys = plan.rows.astype(np.float32), tuple(self._kinds(fraction, steps))
        programs = [
            LaneProgram(
                rows, seed, 0, keys, plan.init_scale, None, {name: {"labels": labels} for name in self.runtime.members}
            )
            for seed, labels in enumerate(self._rows)
        ]
        self._stepper.start(0, *programs)
        self._stepper.activate(range(len(programs)), len(programs))

    def _steps(self, fraction: float, steps: int) -> Callable[[], None]:
        """The very loop of a request, without its beginning and end."""
        kinds = self._kinds(fraction, steps)
        self._stepper.ready(dict.fromkeys(kinds))
        self._start(fraction, steps)
        step_of = {kind: self._stepper.stepping(kind) for kind in dict.fromkeys(kinds)}
        work = [step_of[kind] for kind in kinds]

        def run() -> None:
            for step in work:
                step()

        return run

    def counted(self, fraction: float) -> dict[str, int]:
        """Calls to the device of whole trajectories: what one of N + 10 steps makes more than one of N."""
        counts = []
        for steps in (10, 20):
            request: dict[str, Any] = {"labels": self._labels, "decode": False, "fraction": fraction, **SETTINGS}
            self.runtime.sample(steps=steps, **request)  # records what is new
            before = self.device.calls.copy()
            self.runtime.sample(steps=steps, **request)
            counts.append(self.device.calls - before)
        return {kind: counts[1][kind] - counts[0][kind] for kind in sorted(counts[1] | counts[0])}
