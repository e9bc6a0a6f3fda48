"""The settings of a study: schedules, step counts and solvers as resolved ``Setting`` records, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Final

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.study.divergence.orders import counted, order_names
from tstitch_trt.study.records import Setting

__all__ = [
    "ORDERS",
    "fraction_settings",
    "options_of",
    "plan_of",
    "reference_of",
    "schedule_text",
    "setting_of",
    "share_in_order",
]

ORDERS: Final = ("small-first", "large-first")


def schedule_text(plan: Plan) -> str:
    """The plan's schedule as counts, ``small:20,large:30``, with the guidance scale where the schedule gives one."""
    schedule = plan.schedule
    scales = schedule.guidance or (None,) * len(schedule)
    runs = [(key, len(list(run))) for key, run in groupby(zip(schedule.names, scales, strict=True))]
    return ",".join(f"{name}:{count}" + ("" if g is None else f":g={g:g}") for (name, g), count in runs)


def setting_of(
    manifest: Manifest,
    *,
    schedule: str,
    steps: int,
    solver: str | None = None,
    guidance: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> Setting:
    """The setting of a request; what is ``None`` comes from the bundle's defaults. ``more``: for ``make_plan``.

    Raises ``BadInput`` and its kinds for one that can't be.
    """
    scale = manifest.defaults.guidance if guidance is None else guidance
    own = {"schedule": schedule, "steps": steps, "solver": solver, "guidance": scale}
    plan = make_plan(manifest, PlanOptions.from_keywords({**own, **(more or {})}))
    return Setting(
        schedule=schedule_text(plan),
        members=plan.schedule.counts,
        steps=steps,
        rows=plan.steps,
        solver=plan.solver.name,
        guidance=scale,
        plan=dict(more or {}),
    )


def plan_of(manifest: Manifest, setting: Setting) -> Plan:
    return make_plan(manifest, options_of(setting))


def options_of(setting: Setting) -> PlanOptions:
    """The options that make a setting again."""
    own = {"schedule": setting.schedule, "steps": setting.steps, "solver": setting.solver, "guidance": setting.guidance}
    return PlanOptions.from_keywords({**own, **setting.plan})


def reference_of(manifest: Manifest, settings: Sequence[Setting]) -> Setting:
    """The last member alone in the most steps of ``settings``, which have one solver and guidance.

    Never in fewer steps: each step count would be compared with itself, and look as good as any other.
    """
    setting = max(settings, key=lambda setting: setting.steps)
    return setting_of(
        manifest,
        schedule=list(manifest.members)[-1],
        steps=setting.steps,
        solver=setting.solver,
        guidance=setting.guidance,
        more=setting.plan,
    )


def fraction_settings(
    manifest: Manifest,
    fractions: Sequence[float],
    orders: Sequence[str],
    *,
    steps: int,
    solver: str | None = None,
    guidance: float | None = None,
    rounding: str | None = None,
) -> list[Setting]:
    """The first member for each fraction of the rows (see ``PlanOptions.rounding``) and the last for the others.

    ``orders``: ``small-first`` is T-Stitch's; ``large-first`` the reverse. Raises ``BadInput`` for one member.
    """
    names = list(manifest.members)
    for order in orders:
        if order not in ORDERS:
            raise unknown_name("order", order, ORDERS)
    if len(names) < 2 and fractions:
        raise BadInput(
            f"fractions need two members, the bundle has {names}", hint="name schedules instead: --schedule TEXT"
        )
    small, large = names[0], names[-1]
    make = partial(setting_of, manifest, steps=steps, solver=solver, guidance=guidance)
    plans = [make_plan(manifest, steps=steps, solver=solver, fraction=r, rounding=rounding) for r in fractions]
    rows = plans[0].steps if plans else 0
    counts = [plan.schedule.counts.get(small, 0) for plan in plans]
    schedules = [order_names(order, count, rows, small=small, large=large) for order in orders for count in counts]
    return [make(schedule=counted(names)) for names in schedules]


def share_in_order(setting: Setting, members: Sequence[str], order: str) -> float | None:
    """The first member's share of the rows of a schedule in this order (one member alone is in both), else ``None``."""
    small, large = members[0], members[-1]
    runs = [part.split(":")[0] for part in setting.schedule.split(",")]
    wanted = [small, large] if order == "small-first" else [large, small]
    if runs not in (wanted, [small], [large]):
        return None
    return setting.share(small)
