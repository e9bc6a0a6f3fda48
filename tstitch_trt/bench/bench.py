"""Latency of a bundle: bare engines, step kernels and stitched trajectories, measured side by side.

In every round each trajectory stands between bare calls of the same engines, half of them before and half after it, as
many as it has steps, so that a busy machine slows both alike:

    overhead      median over the rounds of  trajectory time / sum of its bare engine calls
    predicted_ms  sum over the steps of step_ms of the member that runs there: bare engine times alone
    step_ms       median over the rounds of a member's mean bare time per call

Bare calls are launched as the trajectory's steps are: replayed from a graph where those are, else enqueued one by one
(``graph`` says which), and timed by the same clock, that of the device. Warm-up runs are excluded. Times are
milliseconds; a trajectory's is that of its whole batch, without decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from tstitch_engines.checks import check_callable, check_whole, checked, items_of, optional, taken_as_is
from tstitch_engines.errors import BadInput, OutOfProfile
from tstitch_engines.progress import Progress, silent
from tstitch_engines.threads import check_threads
from tstitch_trt.plan.schedule import check_fraction
from tstitch_trt.request.limits import MOST_IMAGES
from tstitch_trt.request.synthetic import synthetic_request
from tstitch_trt.runtime.chooser import check_budget
from tstitch_trt.runtime.step_graphs import GraphState
from tstitch_trt.study.machine import Machine, describe_machine, peak_memory
from tstitch_trt.study.statistics import relative_error, spread

if TYPE_CHECKING:
    from tstitch_trt.bench.torch_eager import EagerTorch
    from tstitch_trt.plan.plan import Plan
    from tstitch_trt.runtime.chooser import ChosenSchedule
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["BaselineTiming", "Bench", "BudgetTiming", "MemberTiming", "TrajectoryTiming", "measure"]

FORMULA = "predicted_ms = sum over the steps of step_ms of the member (guided or not) that runs at that step"

_SETTLE_SECONDS = 0.05  # an engine's threads spin for a while after its last call and would slow the baseline


class MemberTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Bare engine calls of one member on ``batch`` images; ``guided`` calls run both halves, 2 ``batch`` rows.

    ``step_ms`` and its 10th and 90th percentile are over ``blocks`` means, one per round and trajectory.
    """

    name: str
    guided: bool
    step_ms: float
    p10_ms: float
    p90_ms: float
    blocks: int


class BudgetTiming(msgspec.Struct, frozen=True, kw_only=True):
    """How the choice of a trajectory for a budget fared: ``met`` in so many of ``runs``. See ``ChosenSchedule``."""

    budget_ms: float
    predicted_ms: float
    upper_ms: float
    steps: int
    solver: str
    source: str
    metric: str
    quality: float
    interpolated: bool
    met: int
    runs: int


class TrajectoryTiming(msgspec.Struct, frozen=True, kw_only=True):
    fraction: float
    schedule: str
    members: dict[str, int]
    ms: float
    p10_ms: float
    p90_ms: float
    predicted_ms: float
    measured_over_predicted: float
    bare_ms: float
    overhead: float
    images_per_second: float
    budget: BudgetTiming | None = None


class BaselineTiming(msgspec.Struct, frozen=True, kw_only=True):
    """``speedup``: median over the rounds of the baseline's time over ours, taken one after the other."""

    fraction: float
    ms: float
    p10_ms: float
    p90_ms: float
    speedup: float
    relative_difference: float


class BaselineReport(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str
    threads: int
    trajectories: tuple[BaselineTiming, ...]


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """``overhead``: all trajectories' time over all their bare engine calls; the large member weighs most."""

    bundle: str
    backend: str
    device: str
    batch: int
    steps: int
    solver: str
    repeats: int
    warmup: int
    threads: int
    formula: str
    members: tuple[MemberTiming, ...]
    step_kernels_ms: float
    trajectories: tuple[TrajectoryTiming, ...]
    overhead: float
    load_ms: float
    jit_ms: dict[str, float]
    peak_memory_bytes: int
    memory: dict[str, int]
    graph: GraphState
    machine: Machine
    against: BaselineReport | None = None


@checked(
    others=True,
    runtime=taken_as_is,
    fractions=items_of(check_fraction),
    budgets=items_of(check_budget),
    batch=optional(partial(check_whole, low=1, high=MOST_IMAGES)),
    repeats=partial(check_whole, low=1, high=10_000),
    warmup=partial(check_whole, high=10_000),
    threads=check_threads,
    baseline=taken_as_is,
    progress=check_callable,
)
def measure(
    runtime: Runtime,
    *,
    fractions: Sequence[float],
    budgets: Sequence[float] = (),
    batch: int | None = None,
    repeats: int = 5,
    warmup: int = 1,
    threads: int = 0,
    baseline: EagerTorch | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Bench:
    """Measures ``runtime`` at each fraction; ``settings`` are those of ``Runtime.plan``.

    And the schedule that is chosen for each of ``budgets``, milliseconds of a trajectory of the whole batch
    (``Runtime.within_budget``).

    Raises ``OutOfProfile`` for a batch that one engine call can't hold, which would be split, and
    ``BadInput`` when the baseline's latents differ from ours, or it runs on the CPU and the runtime does not.
    """
    if baseline is not None and runtime.device.name != "cpu":
        raise BadInput(
            f"{baseline.name} runs on the CPU and the runtime on {runtime.device.name}: their times are no comparison",
            hint="use --device cpu; on a GPU compare with: python benchmarks/peers.py BUNDLE --device cuda",
        )
    only = runtime.members[0] if len(runtime.members) == 1 else None
    if only is not None and fractions:
        fractions = (0.0,)  # one member has nothing to stitch
    points: list[tuple[float, dict[str, Any], ChosenSchedule | None]] = [
        (fraction, {**settings, **({"fraction": fraction} if only is None else {"schedule": only})}, None)
        for fraction in fractions
    ]
    plans = [runtime.plan(**request) for _, request, _ in points]
    every = _all_members(runtime, settings) if budgets else None
    size = _batch(runtime, batch, guided=any(any(plan.guided) for plan in [*plans, *([every] if every else [])]))
    if every is not None:
        asked = synthetic_request(runtime.manifest, runtime.backend_name, every, size)
        for budget_ms in budgets:
            chosen = runtime.within_budget(budget_ms, **asked, **settings)
            plans.append(runtime.plan(**chosen.settings))
            names = plans[-1].schedule.names
            points.append((names.count(runtime.members[0]) / len(names), chosen.settings, chosen))
    runs = [
        _Trajectory(runtime, fraction, request, plan, size, budget)
        for (fraction, request, budget), plan in zip(points, plans, strict=True)
    ]
    differences: list[float] = []
    if baseline is not None:
        progress(f"comparing latents with {baseline.name}", 0.0)
        baseline.tune(plans[0], runs[0].noise, runs[0].labels)
        differences = [run.compare(baseline) for run in runs]
    rounds = warmup + repeats
    for index in range(rounds):
        for number, run in enumerate(runs):
            share = (index + number / len(runs)) / rounds
            progress(f"round {index + 1} of {rounds}: fraction {run.fraction:g}", share)
            run.round(baseline, keep=index >= warmup)

    members = _members(runtime, runs, size, repeats=repeats)
    by_kind = {(m.name, m.guided): m.step_ms for m in members}
    kernels = runtime.time_step_kernels(size, guided=any(plans[0].guided), repeats=100)
    trajectories = tuple(run.timing(by_kind) for run in runs)
    progress("done", 1.0)
    return Bench(
        bundle=runtime.manifest.name,
        backend=runtime.backend_name,
        device=runtime.device.name,
        batch=size,
        steps=len(plans[0].schedule.names),
        solver=plans[0].table.solver.name,
        repeats=repeats,
        warmup=warmup,
        threads=threads,
        formula=FORMULA,
        members=members,
        step_kernels_ms=statistics.median(kernels),
        trajectories=trajectories,
        overhead=sum(sum(run.times) for run in runs) / sum(sum(run.bare) for run in runs),
        load_ms=runtime.load_ms,
        jit_ms=runtime.jit_ms(),
        peak_memory_bytes=peak_memory(),
        memory=runtime.memory(),
        graph=runtime.graphs(),
        machine=describe_machine(),
        against=None
        if baseline is None
        else BaselineReport(
            name=baseline.name,
            version=baseline.version,
            threads=baseline.threads,
            trajectories=tuple(run.against(d) for run, d in zip(runs, differences, strict=True)),
        ),
    )


class _Trajectory:
    """One fraction's plan and its measurements, one entry per round."""

    def __init__(
        self,
        runtime: Runtime,
        fraction: float,
        request: dict[str, Any],
        plan: Plan,
        batch: int,
        budget: ChosenSchedule | None = None,
    ) -> None:
        self.runtime = runtime
        self.fraction = fraction
        self.request = request
        self.plan = plan
        self.budget = budget
        self.batch = batch
        self.asked: dict[str, Any] = dict(synthetic_request(runtime.manifest, runtime.backend_name, plan, batch))
        self.labels: list[int] = self.asked.get("labels", [])  # a baseline draws classes
        latent = runtime.manifest.latent
        shape = (batch, latent.channels, latent.height, latent.width)
        self.noise = np.random.default_rng(0).standard_normal(shape, np.float32)
        kinds = list(zip(plan.schedule.names, plan.guided, strict=True))
        self.kinds = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}  # (member, guided) -> steps
        self.times: list[float] = []
        self.bare: list[float] = []
        self.others: list[float] = []
        self.blocks: dict[tuple[str, bool], list[float]] = {kind: [] for kind in self.kinds}

    def round(self, baseline: EagerTorch | None, *, keep: bool) -> None:
        before = {kind: self._calls(kind, (steps + 1) // 2) for kind, steps in self.kinds.items()}
        result = self.runtime.sample(**self.asked, seed=0, decode=False, **self.request)
        after = {kind: self._calls(kind, steps // 2) for kind, steps in self.kinds.items()}
        other = None if baseline is None else self._timed_walk(baseline)
        if not keep:
            return
        self.times.append(result.total_ms)
        self.bare.append(sum(sum(before[kind]) + sum(after[kind]) for kind in self.kinds))
        for kind, block in self.blocks.items():
            block.append(statistics.fmean(before[kind] + after[kind]))
        if other is not None:
            self.others.append(other)

    def _calls(self, kind: tuple[str, bool], count: int) -> list[float]:
        name, guided = kind
        if not count:  # the half of a single step
            return []
        return self.runtime.time_member(name, self.batch, guided=guided, repeats=count, warmup=1)

    def _timed_walk(self, baseline: EagerTorch) -> float:
        sleep(_SETTLE_SECONDS)
        start = perf_counter()
        baseline.walk(self.plan, self.noise, self.labels)
        return 1e3 * (perf_counter() - start)

    def compare(self, baseline: EagerTorch) -> float:
        """Relative L2 difference of the baseline's final latents from ours. Raises ``BadInput`` when not equal."""
        ours = self.runtime.sample(**self.asked, latents=self.noise, decode=False, **self.request).latents
        theirs = baseline.walk(self.plan, self.noise, self.labels)
        difference = relative_error(theirs, ours)
        if not difference <= baseline.tolerance:
            raise BadInput(
                f"{baseline.name} draws other latents at fraction {self.fraction:g}: relative difference "
                f"{difference:.2e}; allowed is {baseline.tolerance:.0e}, else the times compare different work",
                hint="compare members built with --precision fp32, on the checkpoints that the bundle was built from",
            )
        return difference

    def timing(self, step_ms: dict[tuple[str, bool], float]) -> TrajectoryTiming:
        ms, low, high = spread(self.times)
        predicted = sum(step_ms[kind] * steps for kind, steps in self.kinds.items())
        return TrajectoryTiming(
            fraction=self.fraction,
            schedule=self.plan.schedule.text,
            members=self.plan.schedule.counts,
            ms=ms,
            p10_ms=low,
            p90_ms=high,
            predicted_ms=predicted,
            measured_over_predicted=ms / predicted,
            bare_ms=statistics.median(self.bare),
            overhead=statistics.median(t / b for t, b in zip(self.times, self.bare, strict=True)),
            images_per_second=1e3 * self.batch / ms,
            budget=None if self.budget is None else self._outcome(self.budget),
        )

    def _outcome(self, budget: ChosenSchedule) -> BudgetTiming:
        chosen = {name: getattr(budget, name) for name in BudgetTiming.__struct_fields__ if hasattr(budget, name)}
        return BudgetTiming(**chosen, met=sum(ms <= budget.budget_ms for ms in self.times), runs=len(self.times))

    def against(self, difference: float) -> BaselineTiming:
        ms, low, high = spread(self.others)
        return BaselineTiming(
            fraction=self.fraction,
            ms=ms,
            p10_ms=low,
            p90_ms=high,
            speedup=statistics.median(o / t for o, t in zip(self.others, self.times, strict=True)),
            relative_difference=difference,
        )


def _batch(runtime: Runtime, batch: int | None, *, guided: bool) -> int:
    limit = runtime.batch_limit // (2 if guided else 1)
    size = min(8, limit) if batch is None else batch
    if not 1 <= size <= limit:
        raise OutOfProfile(
            f"batch {size} does not fit one engine call; allowed is 1 to {limit}"
            + (f" (guidance doubles it, the profile's largest is {runtime.batch_limit})" if guided else ""),
            hint=f"pass --batch {max(limit, 1)}, or build again with --batch 1:{size}:{size * (2 if guided else 1)}",
        )
    return size


def _all_members(runtime: Runtime, settings: dict[str, Any]) -> Plan:
    """A plan in which every member has a step, as far as there are steps: it needs the inputs of any choice."""
    rows = runtime.plan(**settings, schedule=runtime.members[0]).steps
    return runtime.plan(**settings, schedule=list(islice(cycle(runtime.members), rows)))


def _members(runtime: Runtime, runs: list[_Trajectory], batch: int, *, repeats: int) -> tuple[MemberTiming, ...]:
    """Every member's bare time; one that no trajectory used is measured here on its own."""
    guided = any(any(run.plan.guided) for run in runs)
    found: dict[tuple[str, bool], list[float]] = {}
    for run in runs:
        for kind, blocks in run.blocks.items():
            found.setdefault(kind, []).extend(blocks)
    for name in runtime.manifest.members:
        if not any(name == known for known, _ in found):
            found[name, guided] = [
                statistics.fmean(runtime.time_member(name, batch, guided=guided, repeats=10, warmup=1))
                for _ in range(repeats)
            ]
    order = list(runtime.manifest.members)
    timings = []
    for (name, is_guided), blocks in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        ms, low, high = spread(blocks)
        timings.append(
            MemberTiming(name=name, guided=is_guided, step_ms=ms, p10_ms=low, p90_ms=high, blocks=len(blocks))
        )
    return tuple(timings)
