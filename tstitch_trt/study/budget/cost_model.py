"""The best schedule within a latency budget: cost by this machine's calibration, quality by the bundle's studies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from tstitch_engines.errors import BadInput
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.runtime.chooser import ChosenSchedule, check_budget
from tstitch_trt.study.budget.candidates import Candidate, Source, sources
from tstitch_trt.study.budget.predict import predict_ms
from tstitch_trt.study.records import Calibration, Study

if TYPE_CHECKING:
    from tstitch_engines.bundle.manifest import Manifest

__all__ = ["Costs"]

_log = logging.getLogger(__name__)

_ROUNDING: Final = 1 + 1e-9  # a budget that was printed is met by what it was printed for
_KEPT: Final = 32  # kinds of request whose candidates are kept

V = TypeVar("V")


@dataclass(frozen=True)
class _Priced:
    candidate: Candidate
    predicted_ms: float
    upper_ms: float


class Costs:
    """Cost and quality of a bundle's schedules under the conditions of one calibration."""

    def __init__(self, manifest: Manifest, calibration: Calibration, studies: Sequence[Study]):
        """``studies``: searches, evaluations and divergences, of whatever weights."""
        self._manifest = manifest
        self.calibration = calibration
        self._studies = tuple(studies)
        self._sources: dict[str, tuple[list[Source], tuple[str, ...]]] = {}  # by options: plans take the time
        self._tables: dict[str, list[tuple[Source, list[_Priced]]]] = {}

    def choose(
        self,
        budget_ms: float,
        *,
        images: int,
        size: tuple[int, int] | None = None,
        options: PlanOptions | None = None,
        start: Callable[[int], int] = lambda steps: 0,
    ) -> ChosenSchedule:
        """The best schedule whose predicted time, with the spread of single runs, is at most ``budget_ms``.

        Of equally good ones the cheapest. ``size``: height and width of the latent. ``options``: what the
        request fixes, without a schedule. ``start``: the first step to run, by the steps asked for. Raises ``BadInput``
        where nothing fits, naming the cheapest schedule and its time.
        """
        check_budget(budget_ms)
        fixed = options or PlanOptions()
        table = self._table(images, size, fixed, start)
        for source, priced in table:
            within = [one for one in priced if one.upper_ms <= budget_ms * _ROUNDING]
            if within:
                best = min(within, key=lambda one: (one.candidate.bound, one.upper_ms))
                plan, first = best.candidate.plan, self.calibration.steps[0]
                return ChosenSchedule(
                    budget_ms=float(budget_ms),
                    predicted_ms=best.predicted_ms,
                    upper_ms=best.upper_ms,
                    images=images,
                    size=size or (first.height, first.width),
                    schedule=plan.schedule.text,
                    steps=best.candidate.options.asked_steps(self._manifest),
                    solver=plan.solver.name,
                    settings=dict(best.candidate.options.explicit()),
                    source=source.name,
                    made=source.made,
                    metric=source.metric,
                    quality=best.candidate.quality,
                    interpolated=best.candidate.interpolated,
                    calibration=self.calibration.made,
                    notes=self._offers(fixed)[1],
                )
        cheapest = min((one for _, priced in table for one in priced), key=lambda one: one.upper_ms)
        nearest = math.ceil(round(10 * cheapest.upper_ms, 6)) / 10
        least = f"{nearest:.1f}".removesuffix(".0")
        plan = cheapest.candidate.plan
        raise BadInput(
            f"no known schedule draws {images} images within {budget_ms:.10g} ms; the cheapest, {plan.schedule.text} "
            f"({plan.solver.name}), takes {cheapest.predicted_ms:.1f} ms, and up to {cheapest.upper_ms:.1f} ms",
            hint=f"the nearest feasible budget is --budget-ms {least} (latency_budget_ms={least}); "
            "fewer --steps or images take less",
        )

    def _offers(self, options: PlanOptions) -> tuple[list[Source], tuple[str, ...]]:
        """The sources for requests with ``options``, and what was not used, which is said once."""
        key = _key(options)
        if key not in self._sources:
            found, notes = sources(self._manifest, self._studies, options)
            for note in notes:
                _log.warning("%s", note)
            _remember(self._sources, key, (found, notes))
        return self._sources[key]

    def _table(
        self, images: int, size: tuple[int, int] | None, options: PlanOptions, start: Callable[[int], int]
    ) -> list[tuple[Source, list[_Priced]]]:
        """Every source with its candidates and what they cost."""
        usual = self._manifest.defaults.steps
        key = repr((images, size, _key(options), start(1000 * usual)))
        if key not in self._tables:
            table = []
            for source in self._offers(options)[0]:
                priced = []
                for candidate in source.candidates:
                    try:
                        first = start(candidate.options.asked_steps(self._manifest))
                    except BadInput:  # the strength leaves no step of so few
                        if source.name == "rule":
                            raise
                        continue
                    ms = predict_ms(self.calibration, candidate.plan, batch=images, size=size, start=first)
                    priced.append(_Priced(candidate, ms, ms * self.calibration.upper_ratio))
                table.append((source, priced))
            _remember(self._tables, key, table)
        return self._tables[key]


def _key(options: PlanOptions) -> str:
    return repr(options.explicit())


def _remember(known: dict[str, V], key: str, value: V) -> None:
    """Keeps the newest ``_KEPT``."""
    if len(known) >= _KEPT:
        del known[next(iter(known))]
    known[key] = value
