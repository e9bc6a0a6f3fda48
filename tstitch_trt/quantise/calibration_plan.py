"""The trajectories that a member is calibrated on, decided before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, BadSchedule
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.quantise.trajectories import needed_parts
from tstitch_trt.study.image_set import prompts_for

__all__ = ["CalibrationPlan", "plan_calibration"]

_GUIDANCE: Final = 1.5  # of the trajectories where the bundle's own is off
_IMAGES: Final = 4  # trajectories to calibrate on, at least
_HELD_OUT: Final = 4  # trajectories to measure on
_SEED_STRIDE: Final = 1 << 20  # between the seeds that are calibrated and those that are measured on


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """``default``: the schedule of the final comparison. ``names``: the members that run."""

    schedules: tuple[str, ...]
    options: PlanOptions
    steps: int
    solver: str
    guidance: float
    seeds: tuple[int, ...]
    held_out: tuple[int, ...]
    default: str
    prompts: tuple[str, ...]
    names: tuple[str, ...]


def plan_calibration(
    manifest: Manifest,
    name: str,
    schedules: Sequence[str],
    wanted: Mapping[str, Any],
    *,
    samples: int,
    seed: int,
    prompts: Sequence[str] = (),
) -> CalibrationPlan:
    """``wanted``: keywords of ``PlanOptions``. ``prompts``: of a text bundle, by default ``PROMPTS``.

    Raises ``BadSchedule`` for a schedule without the member, and what ``make_plan``, ``needed_parts`` and
    ``prompts_for`` raise.
    """
    options = PlanOptions.from_keywords(wanted)
    if options.guidance is None and manifest.defaults.guidance == 1 and manifest.conditioning.guidable:
        options = replace(options, guidance=_GUIDANCE)
    scale = manifest.defaults.guidance if options.guidance is None else options.guidance
    if isinstance(scale, Mapping):
        raise BadInput(f"guidance is {dict(scale)}; allowed here is one number", hint="e.g. --guidance 1.5")
    default = manifest.defaults.schedule if len(manifest.members) > 1 else name
    plans = {text: make_plan(manifest, options, schedule=text) for text in dict.fromkeys(schedules)}
    for text, plan in plans.items():
        if name not in plan.schedule.names:
            raise BadSchedule(
                f"member {name!r} runs at none of the {plan.steps} steps of {text!r} ({plan.schedule})",
                hint=f"give a schedule that it is in, e.g. --schedule {name}",
            )
    if not plans:
        plans[name] = make_plan(manifest, options, schedule=name)
        try:
            plan = make_plan(manifest, options, schedule=default)
        except BadSchedule:  # for another number of steps
            plan = plans[name]
        if name in plan.schedule.names and set(plan.schedule.names) != {name}:
            plans[default] = plan
    if empty := [index for index, text in enumerate(prompts) if not text.strip()]:
        raise BadInput(f"prompt {empty[0] + 1} of {len(prompts)} is empty", hint="leave it out")
    names = tuple(n for n in manifest.members if any(n in plan.schedule.names for plan in plans.values()))
    needed_parts(manifest, names)
    first = next(iter(plans.values()))
    rows = sum(
        (1 + guided) for p in plans.values() for n, guided in zip(p.schedule.names, p.guided, strict=True) if n == name
    )
    images = max(_IMAGES, math.ceil(samples / rows))
    base = seed * 2 * _SEED_STRIDE
    return CalibrationPlan(
        schedules=tuple(plans),
        options=options,
        steps=first.steps,
        solver=first.solver.name,
        guidance=scale,
        seeds=tuple(range(base, base + images)),
        held_out=tuple(range(base + _SEED_STRIDE, base + _SEED_STRIDE + _HELD_OUT)),
        default=default if default in plans else next(iter(plans)),
        prompts=prompts_for(manifest, prompts, names),
        names=names,
    )
