"""The ``ScheduleChooser`` of runtimes that ``tstitch_trt.load`` returns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from tstitch_engines.bundle.bundle import STUDIES, Bundle
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.runtime.chooser import ChosenSchedule, Setup
from tstitch_trt.study.budget.conditions import Conditions, find_calibration
from tstitch_trt.study.budget.cost_model import Costs
from tstitch_trt.study.records import Divergence, Evaluation, Search
from tstitch_trt.study.store import load_studies

__all__ = ["StudyChooser"]


class StudyChooser:
    """Chooses by the calibration that holds here and the studies of the bundle, as they are on disk at each call."""

    def __init__(self, bundle: Bundle, setup: Setup) -> None:
        self._bundle = bundle
        self._setup = setup
        self._costs: Costs | None = None
        self._state: object = None  # of the studies on disk that ``_costs`` is made from
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
            if (state := _state(self._bundle)) != self._state or self._costs is None:
                calibration = find_calibration(self._bundle, Conditions.here(self._setup))
                studies = [s for kind in (Search, Evaluation, Divergence) for s in load_studies(self._bundle, kind)]
                self._costs, self._state = Costs(self._bundle.manifest, calibration, studies), state
            return self._costs.choose(budget_ms, images=images, size=size, options=options, start=start)


def _state(bundle: Bundle) -> object:
    """What changes when a study is written or removed."""
    found = []
    for path in (bundle.root / STUDIES).glob("*.json"):
        with suppress(FileNotFoundError):  # it was removed just now
            found.append((path.name, path.stat().st_mtime_ns))
    return sorted(found)
