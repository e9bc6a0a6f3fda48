"""A budget that was met: what was chosen, and why."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from tstitch_engines.errors import BadInput
from tstitch_trt.study.budget.candidates import SourceName

if TYPE_CHECKING:
    pass

__all__ = ["Budget", "check_budget"]


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What was chosen for a budget, and why.

    ``predicted_ms``: the median to expect of ``Result.total_ms`` for ``images`` images; ``upper_ms`` what 98 of 100
    runs stay under, which is compared with ``budget_ms``. ``size``: height and width of the latents. ``settings``:
    keywords of ``make_plan``, ``schedule``, ``steps`` and ``solver`` among them. ``source``: the study of ``made`` that
    knows the quality, or T-Stitch's rule; ``interpolated``: its ``metric`` was measured of schedules on both sides of
    it. ``calibration``: when it was made. ``notes``: which studies were not used, and why.
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
    source: SourceName
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


def check_budget(budget_ms: float) -> None:
    """Raises ``BadInput`` for what is no time."""
    if isinstance(budget_ms, bool) or not isinstance(budget_ms, (int, float)) or not 0 < budget_ms < math.inf:
        raise BadInput(
            f"a latency budget of {budget_ms!r} ms; allowed are finite numbers above 0",
            hint="e.g. --budget-ms 500 (latency_budget_ms=500)",
        )
