"""A latency budget in place of a schedule: what a runtime asks of whoever chooses, and what it is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.request.init_image import check_start_wishes, start_step
from tstitch_trt.request.limits import Limits
from tstitch_trt.request.options import Wishes, split_wishes
from tstitch_trt.request.request import extent

__all__ = ["ChooserFactory", "ChosenSchedule", "ScheduleChooser", "Setup", "check_budget", "choose", "chosen_settings"]


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
    keywords of ``make_plan``, ``schedule``, ``steps`` and ``solver`` among them. ``source``: the kind of measurement
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
        settings: Mapping[str, Any],
        start: Callable[[int], int],
    ) -> ChosenSchedule:
        """The best schedule whose trajectories take at most ``budget_ms``.

        ``size``: height and width of the latent. ``settings``: keywords of ``make_plan`` that the request fixes,
        without a schedule. ``start``: the first step to run, by the steps asked for. Raises ``BadInput`` where nothing
        fits.
        """


ChooserFactory = Callable[[Bundle, Setup], ScheduleChooser]


def choose(
    chooser: ScheduleChooser | None, bundle: Bundle, limits: Limits, budget_ms: float, wishes: Wishes
) -> ChosenSchedule:
    """The schedule for one request. See ``Runtime.within_budget``."""
    check_budget(budget_ms)
    if chooser is None:
        raise Unavailable(
            f"a latency budget of {budget_ms:g} ms, and this runtime was loaded without a chooser of schedules",
            hint="load it with tstitch_trt.load, or give schedule= or fraction= in place of latency_budget_ms=",
        )
    pictures, settings = split_wishes(wishes)
    for name in ("schedule", "fraction"):
        if settings.get(name) is not None:
            raise BadInput(
                f"{name} {settings[name]!r} is given beside a budget of {budget_ms:g} ms, which chooses it",
                hint=f"leave out one of the two: --{name} or --budget-ms ({name}= or latency_budget_ms=)",
            )
    if pictures.get("control") is not None:
        raise BadInput(
            "a budget is given beside a control picture, and what the ControlNet costs is not calibrated",
            hint="leave out one of the two: --control or --budget-ms (control= or latency_budget_ms=)",
        )
    check_start_wishes(pictures)
    settings = {name: value for name, value in settings.items() if value is not None}
    entered: int = pictures.get("start_step", 0)
    if entered and settings.get("timesteps") is None:
        settings.setdefault("steps", bundle.manifest.defaults.steps)  # the state given is that of one number of steps

    def start(steps: int) -> int:
        return entered if pictures.get("image") is None else start_step(pictures, steps)

    images, size = extent(bundle.manifest, limits, pictures)
    return chooser.choose(budget_ms, images=images, size=size, settings=settings, start=start)


def chosen_settings(settings: Mapping[str, Any], chosen: ChosenSchedule) -> dict[str, Any]:
    """The keywords of ``make_plan`` of the request for which ``chosen`` was chosen."""
    kept = {name: value for name, value in settings.items() if name not in ("schedule", "fraction")}
    return {**kept, **chosen.settings}


def check_budget(budget_ms: float) -> None:
    """Raises ``BadInput`` for what is no time."""
    if isinstance(budget_ms, bool) or not isinstance(budget_ms, (int, float)) or not 0 < budget_ms < math.inf:
        raise BadInput(
            f"a latency budget of {budget_ms!r} ms; allowed are finite numbers above 0",
            hint="e.g. --budget-ms 500 (latency_budget_ms=500)",
        )
