"""The plan of a request: the solver's table, the schedule and the guidance as one row per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.step_row import ROW
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.plan.guidance import _channels, _embedded, _guidance
from tstitch_trt.plan.member_columns import is_adapted, member_columns
from tstitch_trt.plan.schedule import Schedule, fraction_text, resolve
from tstitch_trt.plan.step_rows import fill_rows
from tstitch_trt.solvers import SPACING_OPTIONS, SolverOptions, StepTable, make_table, with_default_spacing
from tstitch_trt.solvers.noise_schedule import NoiseSchedule

__all__ = ["HISTORIES", "Plan", "make_plan"]

HISTORIES: Final = ("keep", "reset")


@dataclass(frozen=True, eq=False)
class Plan:
    """``rows`` float64 ``[N,25]`` (see ``step_row``), read-only; ``guided[i]``: step i runs both halves.

    A row is one evaluation of a member, and "step" means a row from here on: in schedules, fractions, events, timings
    and results. Solvers make as many rows as they were asked for steps, but ``pndm``, which has one more.

    ``embedded``: the guidance scale that distilled members are given as an input, in place of a second half.
    """

    schedule: Schedule
    table: StepTable
    rows: NDArray[np.float64]
    guided: tuple[bool, ...]
    rescale: bool
    embedded: Mapping[str, float] = field(default_factory=dict)

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


def make_plan(
    manifest: Manifest,
    *,
    steps: int | None = None,
    solver: str | SolverOptions | None = None,
    spacing: str | None = None,
    sigmas: str | None = None,
    eta: float | None = None,
    variance: str | None = None,
    solver_options: Mapping[str, object] | None = None,
    timesteps: Sequence[float] | None = None,
    history: str = "keep",
    schedule: str | Sequence[str] | None = None,
    fraction: float | None = None,
    rounding: str = "paper",
    guidance: float | Mapping[str, float] | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[int, int] | None = None,
    guided_channels: int | None = None,
    start: int = 0,
) -> Plan:
    """The plan for one bundle; what is ``None`` comes from the bundle's defaults.

    ``solver``: a name, or ``SolverOptions``; ``spacing``, ``sigmas``, ``eta``, ``variance`` and ``solver_options`` are
    its options. ``timesteps``: explicit ones in place of ``steps`` and a spacing. ``history``: whether a multistep
    solver keeps the estimates of the member before across a switch (``keep``) or starts again (``reset``).

    ``schedule``: see ``tstitch_trt.plan.schedule``; ``fraction`` is the short form for the first and the last member.
    ``rounding`` turns fractions into steps.

    ``guidance``: classifier-free guidance scale (arXiv 2207.12598), 1 = off; one number, or one per member; the
    schedule's own ``:g=`` goes first. ``guidance_rescale``: arXiv 2305.08891, section 3.4, 0 = off.
    ``guidance_interval``: guide steps ``start <= i < stop`` only. ``guided_channels``: guide the first k channels. A
    member distilled for a guidance scale (``Member.guidance_embedding``) takes the scale as an input and runs one half.

    ``start``: the step at which the trajectory is entered from a picture; a multistep solver starts again there.

    Raises ``BadInput`` and its kinds.
    """
    defaults = manifest.defaults
    noise = NoiseSchedule.from_spec(manifest.noise)
    options = _solver(manifest, solver, spacing, sigmas, eta, variance, solver_options, timesteps)
    if steps is None and timesteps is None:
        steps = defaults.steps
    table = make_table(options, noise, steps, timesteps=timesteps)
    resolved = resolve(
        _schedule(manifest, schedule, fraction),
        members=tuple(manifest.members),
        timesteps=table.t,
        sigmas=table.sigma,
        train_steps=manifest.noise.steps,
        rounding=rounding,
    )
    if history not in HISTORIES:
        raise unknown_name("history", history, HISTORIES)
    restarts = {segment.start for segment in resolved.segments[1:]} if history == "reset" else set()
    restarts |= {start} - {0}
    if restarts and table.history:
        table = make_table(options, noise, steps, timesteps=timesteps, restarts=restarts)

    scales = _guidance(manifest, resolved, defaults.guidance if guidance is None else guidance, guidance_interval)
    embedded = _embedded(manifest, resolved, scales)
    guided = tuple(bool(scale != 1) for scale in scales)
    channels = _channels(manifest, guided_channels)
    t, c_in, p, q = (np.empty(table.steps) for _ in range(4))
    for name in dict.fromkeys(resolved.names):
        mine = np.array([n == name for n in resolved.names])
        t[mine], c_in[mine], p[mine], q[mine] = member_columns(manifest, name, table, mine)
    _check_variance(manifest, resolved, table)
    rows = fill_rows(
        table,
        p=p,
        q=q,
        guidance=scales,
        rescale=np.where(guided, guidance_rescale, 0.0) if 0 <= guidance_rescale <= 1 else guidance_rescale,
        guided_channels=channels,
        learned=np.array([manifest.members[name].learned_variance for name in resolved.names]),
    )
    rows[:, ROW["T"]], rows[:, ROW["C_IN"]] = t, c_in
    rows.flags.writeable = False
    return Plan(resolved, table, rows, guided, bool(guidance_rescale) and any(guided), embedded)


def _solver(
    manifest: Manifest,
    solver: str | SolverOptions | None,
    spacing: str | None,
    sigmas: str | None,
    eta: float | None,
    variance: str | None,
    more: Mapping[str, object] | None,
    timesteps: Sequence[float] | None,
) -> SolverOptions:
    """What the caller says, and where it leaves room what the bundle's defaults say of their own solver."""
    defaults = manifest.defaults
    base = solver if isinstance(solver, SolverOptions) else SolverOptions(name=solver or defaults.solver)
    given = {"spacing": spacing, "sigmas": sigmas, "eta": eta, "variance": variance}
    said = {name: value for name, value in given.items() if value is not None} | dict(more or {})
    said = {**base.said(), **said}
    usual = dict(defaults.solver_options) if base.name == defaults.solver else {}
    if timesteps is not None or said.keys() & {"spacing", "sigmas"}:  # other places for the steps: none of the usual
        usual = {name: value for name, value in usual.items() if name not in SPACING_OPTIONS}
    if timesteps is not None or "sigmas" in said:
        usual = {name: value for name, value in usual.items() if name not in ("step_to", "original_steps")}
    options = SolverOptions.parse(base.name, {**usual, **said})
    if timesteps is not None:
        return options
    offset = defaults.solver_options.get("steps_offset")
    return with_default_spacing(options, defaults.spacing, offset if isinstance(offset, int) else None)


def _schedule(manifest: Manifest, schedule: str | Sequence[str] | None, fraction: float | None) -> str | Sequence[str]:
    if schedule is not None and fraction is not None:
        raise BadInput(
            f"both fraction {fraction:g} and schedule {schedule!r} are given",
            hint="a fraction is a short schedule: give one of the two",
        )
    if fraction is not None:
        return fraction_text(fraction, tuple(manifest.members))
    return manifest.defaults.schedule if schedule is None else schedule


def _check_variance(manifest: Manifest, schedule: Schedule, table: StepTable) -> None:
    """A learned variance is a point between the two bounds of the member's own schedule."""
    adapted = [name for name in dict.fromkeys(schedule.names) if is_adapted(manifest, name)]
    if table.uses_variance and adapted:
        raise BadInput(
            f"solver {table.solver} reads a learned variance, and member {adapted[0]!r} learned its own on another "
            "noise schedule or latent scaling than the bundle's",
            hint="use variance='fixed-small' or 'fixed-large' (--variance)",
        )
