"""How far the members of a bundle are apart at each step, and the order and share of steps that follow from it.

At every state of the reference member's trajectory each other member runs too. Denoised estimates are compared, so
that members of any prediction type and noise schedule can be: where a small member's is close to the reference's, its
step costs no quality (T-Stitch, arXiv 2402.14167, section 3). Then schedules of equal counts in several orders are run
from the same noise, and their final latents compared with the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.checks import (
    check_callable,
    check_number,
    check_text,
    check_whole,
    checked,
    items_of,
    optional,
    taken_as_is,
)
from tstitch_engines.errors import BadInput, BadSchedule, unknown_name
from tstitch_engines.progress import Progress, silent
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.progress import Phases
from tstitch_trt.request.limits import MOST_IMAGES, MOST_SEED, check_prompt
from tstitch_trt.study.divergence.orders import (
    FEW_SEEDS,
    MEMBER_ORDERS,
    SHARES,
    TRIED,
    counted,
    order_names,
    small_counts,
    suggest,
)
from tstitch_trt.study.divergence.trajectories import (
    SINGLE_STEP,
    MemberTrajectories,
    batches,
    images_of,
    is_single_step,
)
from tstitch_trt.study.records import Divergence, DivergenceStep, OrderTrial
from tstitch_trt.study.statistics import compare_rows, spread
from tstitch_trt.study.store import check_command, provenance

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["LEAST_SAMPLES", "LEAST_STEPS", "profile", "profile_solver", "reference_of"]

LEAST_SAMPLES: Final = 2
LEAST_STEPS: Final = 4
_ALONE: Final = "small-only"
_PLACES: Final = (*MEMBER_ORDERS, _ALONE)

Doubles = NDArray[np.float64]


def reference_of(manifest: Manifest, wanted: str | None) -> str:
    """The member that others are compared with: ``wanted``, or the last. Raises ``BadInput`` and ``UnknownName``."""
    names = tuple(manifest.members)
    if len(names) < 2:
        raise BadInput(
            f"the bundle {manifest.name!r} has one member, {names[0]!r}: there is nothing to compare it with",
            hint="build a bundle of a small and a large member",
        )
    if wanted is not None and wanted not in names:
        raise unknown_name("member", wanted, names)
    return names[-1] if wanted is None else wanted


def profile_solver(manifest: Manifest, wanted: str | None) -> str:
    """The solver of a profile: ``wanted``, else the bundle's own, or ``ddim`` where that one remembers estimates."""
    if wanted is not None:
        return wanted
    usual = manifest.defaults.solver
    return usual if is_single_step(make_plan(manifest, schedule=next(iter(manifest.members)))) else SINGLE_STEP


@checked(
    runtime=taken_as_is,
    samples=partial(check_whole, high=MOST_IMAGES),
    seed=partial(check_whole, high=MOST_SEED),
    reference=optional(partial(check_text, example="large", most=1000)),
    steps=taken_as_is,  # these two by PlanOptions
    solver=taken_as_is,
    guidance=optional(check_number),
    prompts=items_of(check_prompt, MOST_IMAGES),
    command=check_command,
    progress=check_callable,
)
def profile(
    runtime: Runtime,
    *,
    samples: int = 8,
    seed: int = 0,
    reference: str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    guidance: float | None = None,
    prompts: Sequence[str] = (),
    command: str = "",
    progress: Progress = silent,
) -> Divergence:
    """Divergence of every member from ``reference`` (the last), trials of several orders, and a suggested schedule.

    Steps, solver and guidance are by default the bundle's; see ``profile_solver`` and ``images_of``.

    Raises ``BadInput`` for a bundle of one member, an unknown member, fewer than ``LEAST_SAMPLES``
    samples or ``LEAST_STEPS`` steps, and a solver that can't be entered in the middle.
    """
    manifest = runtime.manifest
    chosen = reference_of(manifest, reference)
    if samples < LEAST_SAMPLES:
        raise BadInput(
            f"{samples} samples have no median and spread; allowed is {LEAST_SAMPLES} or more", hint="e.g. --samples 8"
        )
    others = [name for name in manifest.members if name != chosen]
    scale = manifest.defaults.guidance if guidance is None else guidance
    settings = {"steps": steps, "solver": profile_solver(manifest, solver), "guidance": scale}
    options = PlanOptions.from_keywords(settings)
    plan = make_plan(manifest, options, schedule=chosen)
    _check_plan(plan)
    images = images_of(manifest, samples=samples, seed=seed, prompts=prompts)
    tried = [(order, count) for count in small_counts(SHARES, plan.steps) for order in MEMBER_ORDERS]
    curve = small_counts(TRIED, plan.steps)
    parts = batches(runtime, scale, samples)
    phases = Phases(progress)
    phases.phase(f"running {chosen}", 0.0, 0.5, len(parts) * plan.steps * (1 + len(others)))
    every = []
    compared: dict[str, list[list[tuple[Doubles, Doubles] | None]]] = {name: [] for name in others}
    for part in parts:
        trajectories = MemberTrajectories(
            runtime,
            images=images.keywords(manifest, part.start, part.stop, manifest.members),
            settings=settings,
            steps=plan.steps,
            tick=phases.tick,
        )
        phases.tick(0, f"running {chosen}")
        wanted = trajectories.whole(chosen)
        for name in others:
            phases.tick(0, f"comparing {name}")
            got = [trajectories.estimate(name, chosen, step) for step in range(plan.steps)]
            pairs = zip(got, wanted, strict=True)
            compared[name].append([None if ours is None else compare_rows(ours, want) for ours, want in pairs])
        every.append(trajectories)
    trials = _Trials(every, others[0], chosen, plan.steps, phases)
    phases.phase("trying orders", 0.5, 1.0, (1 + len(tried) + len(curve)) * len(parts) * plan.steps)
    suggestion = suggest(
        trials.alone(),
        trials.run(tried),
        more=lambda order: trials.run([(order, count) for count in curve]),
        small=others[0],
        large=chosen,
        resolve=lambda text: make_plan(manifest, options, schedule=text).schedule.names,
    )
    progress("done", 1.0)
    return Divergence(
        **provenance(manifest, command),
        reference=chosen,
        steps=plan.steps,
        solver=plan.solver.name,
        guidance=float(scale),
        seeds=tuple(range(seed, seed + samples)),
        prompts=images.prompts,
        members={name: _steps(plan, compared[name]) for name in others},
        orders=tuple(sorted(suggestion.trials, key=lambda trial: (trial.share, _PLACES.index(trial.order)))),
        order=suggestion.order,
        suggested=suggestion.schedule,
        reason=suggestion.reason + ("" if samples >= FEW_SEEDS else f" {samples} seeds are few: it may be by chance."),
    )


def _check_plan(plan: Plan) -> None:
    if not is_single_step(plan):
        raise BadInput(
            f"solver {plan.solver.name!r} needs the estimates of the steps before: its trajectory can't be entered at "
            "another member's state",
            hint=f"compare with a single-step solver: --solver {SINGLE_STEP} (or ddpm, euler, lcm)",
        )
    if plan.steps < LEAST_STEPS:
        raise BadInput(
            f"{plan.steps} steps are too few to try orders of members; allowed is {LEAST_STEPS} or more",
            hint="e.g. --steps 20",
        )


def _steps(plan: Plan, parts: Sequence[Sequence[tuple[Doubles, Doubles] | None]]) -> tuple[DivergenceStep, ...]:
    """Medians over all seeds. A step at which the member can't run is left out."""
    steps = []
    for step in range(plan.steps):
        pairs = [pair for part in parts if (pair := part[step]) is not None]
        if not pairs:
            continue
        cosine, distance = (np.concatenate(values) for values in zip(*pairs, strict=True))
        middle, low, high = spread(distance)
        steps.append(
            DivergenceStep(
                step=step,
                timestep=float(plan.table.t[step]),
                sigma=float(plan.table.sigma[step]) if plan.table.a[step] > 0 else None,
                cosine=float(np.median(cosine)),
                rel_l2=middle,
                p10=low,
                p90=high,
            )
        )
    return tuple(steps)


@dataclass(eq=False)
class _Trials:
    """Schedules that are run on all parts of the seeds."""

    every: Sequence[MemberTrajectories]
    small: str
    large: str
    steps: int
    phases: Phases
    known: dict[tuple[str, ...], Doubles] = field(default_factory=dict)

    def alone(self) -> OrderTrial | None:
        """The small member alone: the most that a schedule of the two can be away."""
        try:
            for trajectories in self.every:
                trajectories.whole(self.small)
        except BadSchedule:  # it can't begin without signal, so it has no states to start from
            return None
        return self._measured(_ALONE, 1.0, (self.small,) * self.steps)

    def run(self, tried: Sequence[tuple[str, int]]) -> list[OrderTrial]:
        """``tried``: orders and steps of the small member. A schedule that the plan refuses is left out."""
        found = []
        for order, count in tried:
            names = order_names(order, count, self.steps, small=self.small, large=self.large)
            self.phases.tick(0, f"trying {order}")
            with suppress(BadSchedule):
                found.append(self._measured(order, count / self.steps, names))
        return found

    def _measured(self, order: str, share: float, names: tuple[str, ...]) -> OrderTrial:
        if names not in self.known:
            want = (self.large,) * self.steps
            errors = [compare_rows(one.final(names), one.final(want))[1] for one in self.every]
            self.known[names] = np.concatenate(errors)
        middle, low, high = spread(self.known[names])
        return OrderTrial(order=order, share=share, schedule=counted(names), latent_error=middle, p10=low, p90=high)
