"""A latency budget in place of a schedule: what a runtime asks of whoever chooses, and what it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import msgspec

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.checks import plain_number, shown
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.request.parse import ParsedRequest

__all__ = ["ChooserFactory", "ChosenSchedule", "ScheduleChooser", "Setup", "check_budget", "choose", "chosen_options"]


_LONGEST: Final = 1e12  # ms, thirty years


@dataclass(frozen=True)
class Setup:
    """How a runtime was loaded. ``threads``: 0 is all cores. ``graph``: the mode in use."""

    backend: str
    device: str
    threads: int
    graph: str


class ChosenSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """The schedule that was chosen for a budget, and why.

    ``predicted_ms``: the median to expect of ``Result.total_ms`` for ``images`` images; ``upper_ms``: what 98 of 100
    runs stay under, which is compared with ``budget_ms``. ``size``: height and width of the latents. ``settings``:
    keywords of ``make_plan``, with ``schedule``, ``steps`` and ``solver``. ``source``: the kind of measurement
    that knows the quality, made at ``made``, or ``rule`` for T-Stitch's own; ``interpolated``: its ``metric`` was
    measured of schedules on both sides of it. ``calibration``: when the costs were measured. ``notes``: which
    measurements were not used, and why.
    """

    budget_ms: float
    predicted_ms: float
    upper_ms: float
    images: int
    size: tuple[int, int]
    schedule: str
    steps: int
    solver: str
    settings: dict[str, Any]
    source: str
    made: str
    metric: str
    quality: float
    interpolated: bool
    calibration: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = {"rule": "T-Stitch's rule, small member first"}.get(self.source, f"the {self.source} of {self.made}")
        near = " (interpolated)" if self.interpolated else ""
        return (
            f"budget {self.budget_ms:.10g} ms: {self.schedule} ({self.solver}, {self.steps} steps), predicted "
            f"{self.predicted_ms:.1f} ms, at most {self.upper_ms:.1f} ms; by {told}: {self.metric} "
            f"{self.quality:.4g}{near}"
        )


class ScheduleChooser(Protocol):
    """Knows what schedules of one bundle cost under one ``Setup``, and how good they are."""

    def choose(
        self,
        budget_ms: float,
        *,
        images: int,
        size: tuple[int, int],
        options: PlanOptions,
        start: Callable[[int], int],
    ) -> ChosenSchedule:
        """The best schedule whose trajectories take at most ``budget_ms``.

        ``size``: height and width of the latent. ``options``: what the request fixes, without a schedule. ``start``:
        the first step to run, by the steps asked for. Raises ``BadInput`` where nothing fits.
        """


ChooserFactory = Callable[[Bundle, Setup], ScheduleChooser]


def choose(
    chooser: ScheduleChooser | None, manifest: Manifest, budget_ms: float, options: PlanOptions, parsed: ParsedRequest
) -> ChosenSchedule:
    """The schedule for one request. See ``Runtime.within_budget``."""
    if chooser is None:
        raise Unavailable(
            f"a latency budget of {budget_ms:g} ms, and this runtime was loaded without a chooser of schedules",
            hint="load it with tstitch_trt.load, or give schedule= or fraction= in place of latency_budget_ms=",
        )
    for name in ("schedule", "fraction", "rounding"):
        value = getattr(options, name)
        if value is not None:
            raise BadInput(
                f"{name} {shown(value)} is given beside a budget of {budget_ms:g} ms, which chooses it",
                hint=f"leave out one of the two: --{name} or --budget-ms ({name}= or latency_budget_ms=)",
            )
    if parsed.control is not None:
        raise BadInput(
            "a budget is given beside a control picture, and what the ControlNet costs is not calibrated",
            hint="leave out one of the two: --control or --budget-ms (control= or latency_budget_ms=)",
        )
    if parsed.start_step and options.timesteps is None:  # the state given is that of one number of steps
        options = replace(options, steps=options.asked_steps(manifest))
    return chooser.choose(budget_ms, images=parsed.n, size=parsed.size, options=options, start=parsed.first_step)


def chosen_options(options: PlanOptions, chosen: ChosenSchedule) -> PlanOptions:
    """The options of the request for which ``chosen`` was chosen."""
    return PlanOptions.from_keywords(chosen.settings).on_top_of(options)


def check_budget(budget_ms: object, what: str = "latency_budget_ms") -> float:
    """Milliseconds. Raises ``BadInput`` for what is no time."""
    number = plain_number(budget_ms)
    if number is None or not 0 < number <= _LONGEST:
        raise BadInput(
            f"a latency budget of {shown(budget_ms)} ms; allowed are finite numbers above 0",
            hint=f"e.g. --budget-ms 500 ({what}=500)",
        )
    return float(number)
