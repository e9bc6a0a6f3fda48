"""The ``ScheduleChooser`` of runtimes that ``tstitch_trt.load`` returns."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tstitch_engines.bundle.bundle import Bundle
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.runtime.chooser import ChosenSchedule, Setup
from tstitch_trt.study.budget.conditions import Conditions
from tstitch_trt.study.budget.cost_model import Costs

__all__ = ["StudyChooser"]


class StudyChooser:
    """Chooses by the calibration that holds here and the studies of the bundle, as they are on disk at each call."""

    def __init__(self, bundle: Bundle, setup: Setup) -> None:
        self._bundle = bundle
        self._setup = setup
        self._costs: Costs | None = None
        self._lock = threading.Lock()

    def choose(
        self,
        budget_ms: float,
        *,
        images: int,
        size: tuple[int, int],
        options: PlanOptions,
        start: Callable[[int], int],
    ) -> ChosenSchedule:
        """See ``Costs.choose``. Raises ``NotCalibrated`` besides."""
        with self._lock:
            self._costs = Costs.of(self._bundle, Conditions.here(self._setup), self._costs)
            return self._costs.choose(budget_ms, images=images, size=size, options=options, start=start)
