"""The plan of a request: the solver's table, the schedule and the guidance as one row per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.checks import FLOAT32_MAX, check_type, checked, optional
from tstitch_engines.device.step_row import ROW, ROW_FIELDS
from tstitch_engines.errors import BadInput
from tstitch_trt.plan.guidance import guided_channels, guided_steps
from tstitch_trt.plan.member_columns import is_adapted, member_columns
from tstitch_trt.plan.options import PlanKeywords, PlanOptions
from tstitch_trt.plan.schedule import Schedule, fraction_text, resolve
from tstitch_trt.plan.step_rows import fill_rows
from tstitch_trt.solvers import SPACING_OPTIONS, SolverOptions, StepTable, make_table, with_default_spacing
from tstitch_trt.solvers.noise_schedule import NoiseSchedule
from tstitch_trt.solvers.registry import find_solver, idle_options

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True, eq=False)
class Plan:
    """``rows`` float64 ``[N,25]`` (see ``step_row``), read-only; ``guided[i]``: step i runs both halves.

    A row is one evaluation of a member, and "step" means a row from here on: in schedules, fractions, events, timings
    and results. Solvers make as many rows as they were asked for steps, but ``pndm``, which has one more.

    ``start``: the row at which the trajectory is entered from a picture. ``embedded``: the guidance scale that
    distilled members are given as an input, in place of a second half.
    """

    schedule: Schedule
    table: StepTable
    rows: NDArray[np.float64]
    guided: tuple[bool, ...]
    rescale: bool
    embedded: Mapping[str, float] = field(default_factory=dict)
    start: int = 0

    @property
    def steps(self) -> int:
        return len(self.schedule)

    @property
    def solver(self) -> SolverOptions:
        """The solver with every default filled in."""
        return self.table.solver

    @property
    def init_scale(self) -> float:
        """What unit Gaussian noise is multiplied by to make the first state."""
        return self.table.init_scale


@checked(
    others=True,
    manifest=partial(check_type, kind=Manifest),
    options=optional(partial(check_type, kind=PlanOptions)),
)
def make_plan(manifest: Manifest, options: PlanOptions | None = None, **keywords: Unpack[PlanKeywords]) -> Plan:
    """The plan for one bundle. ``keywords`` are fields of ``PlanOptions`` and go on top of ``options``.

    What is not said comes from the bundle's defaults; a default that does not fit what was said is left out. Raises
    ``BadInput`` and its kinds.
    """
    said = PlanOptions.from_keywords(keywords)
    options = said if options is None else said.on_top_of(options) if keywords else options
    noise = NoiseSchedule.from_spec(manifest.noise)
    solver = _solver(manifest, options)
    steps = None if options.steps is None and options.timesteps is not None else options.asked_steps(manifest)
    table = make_table(solver, noise, steps, timesteps=options.timesteps)
    schedule = manifest.defaults.schedule if options.schedule is None else options.schedule
    if options.fraction is not None:
        schedule = fraction_text(options.fraction, tuple(manifest.members))
    resolved = resolve(
        schedule,
        members=tuple(manifest.members),
        timesteps=table.t,
        sigmas=table.sigma,
        train_steps=manifest.noise.steps,
        rounding=options.rounding,
    )
    multistep = find_solver(solver.name).multistep
    if options.history == "reset" and not multistep:
        raise BadInput(
            f"history='reset' would be ignored: solver {solver.name!r} keeps no estimates of earlier steps",
            hint="leave history out, or choose a multistep solver",
        )
    start = options.start or 0
    if start >= table.steps:
        raise BadInput(
            f"start {start} (start_step of a request) is outside 0..{table.steps - 1}, the steps of this trajectory",
            hint="0 starts from noise",
        )
    restarts = {segment.start for segment in resolved.segments[1:]} if options.history == "reset" else set()
    restarts |= {start} - {0}
    if restarts and multistep:
        table = make_table(solver, noise, steps, timesteps=options.timesteps, restarts=restarts)

    guidance = guided_steps(manifest, resolved, options)
    guided = tuple(bool(scale != 1) for scale in guidance.scales)
    rescale = options.guidance_rescale or 0.0
    t, c_in, p, q = (np.empty(table.steps) for _ in range(4))
    for name in dict.fromkeys(resolved.names):
        mine = np.array([n == name for n in resolved.names])
        t[mine], c_in[mine], p[mine], q[mine] = member_columns(manifest, name, table, mine)
    _check_variance(manifest, resolved, table)
    rows = fill_rows(
        table,
        p=p,
        q=q,
        guidance=guidance.scales,
        rescale=np.where(guided, rescale, 0.0),
        guided_channels=guided_channels(manifest, options.guided_channels),
        learned=np.array([manifest.members[name].learned_variance for name in resolved.names]),
    )
    rows[:, ROW["T"]], rows[:, ROW["C_IN"]] = t, c_in
    _check_float32(rows)
    rows.flags.writeable = False
    return Plan(resolved, table, rows, guided, bool(rescale) and any(guided), guidance.embedded, start)


def _solver(manifest: Manifest, options: PlanOptions) -> SolverOptions:
    """What was said, and where that leaves room what the bundle's defaults say of their own solver."""
    defaults, solver = manifest.defaults, options.solver
    base = solver if isinstance(solver, SolverOptions) else SolverOptions(name=solver or defaults.solver)
    own = {"spacing": options.spacing, "sigmas": options.sigmas, "eta": options.eta, "variance": options.variance}
    own = {name: value for name, value in own.items() if value is not None}
    said = {**base.explicit(), **own, **(options.solver_options or {})}
    usual = dict(defaults.solver_options) if base.name == defaults.solver else {}
    placed = options.timesteps is not None
    if placed or said.keys() & {"spacing", "sigmas"}:  # other places for the steps: none of the usual
        usual = {name: value for name, value in usual.items() if name not in SPACING_OPTIONS}
    if placed or "sigmas" in said:
        usual = {name: value for name, value in usual.items() if name not in ("step_to", "original_steps")}
    idle = idle_options(SolverOptions.parse(base.name, {**usual, **said}))
    found = SolverOptions.parse(base.name, {**{k: v for k, v in usual.items() if k not in idle}, **said})
    if placed:
        return found
    offset = defaults.solver_options.get("steps_offset")
    return with_default_spacing(found, defaults.spacing, offset if isinstance(offset, int) else None)


def _check_float32(rows: NDArray[np.float64]) -> None:
    """The kernels compute in float32, where a larger number is infinite."""
    for row, column in np.argwhere(~(np.abs(rows) <= FLOAT32_MAX)):
        raise BadInput(
            f"step {row} has {ROW_FIELDS[column]} = {rows[row, column]:g}, which is more than float32 holds",
            hint="use usual values for guidance, eta and the solver's options",
        )


def _check_variance(manifest: Manifest, schedule: Schedule, table: StepTable) -> None:
    """A learned variance is a point between the two bounds of the member's own schedule."""
    adapted = [name for name in dict.fromkeys(schedule.names) if is_adapted(manifest, name)]
    if table.uses_variance and adapted:
        raise BadInput(
            f"solver {table.solver} reads a learned variance, and member {adapted[0]!r} learned its own on another "
            "noise schedule or latent scaling than the bundle's",
            hint="use variance='fixed-small' or 'fixed-large' (--variance)",
        )
