"""The plot beside the pictures: what the studies measured, with the chosen point marked."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from markupsafe import Markup

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.plan.plan import Plan
from tstitch_trt.plots.evaluation import draw_quality, timed
from tstitch_trt.plots.figure import require_matplotlib
from tstitch_trt.plots.search import draw_search
from tstitch_trt.plots.svg import svg
from tstitch_trt.plots.templates import fill
from tstitch_trt.plots.words import METRIC_NAMES, date
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.budget import Conditions, find_calibration, predict_ms
from tstitch_trt.study.gather import Studies, by_metric
from tstitch_trt.study.records import Point, SearchPoint
from tstitch_trt.study.settings import schedule_text
from tstitch_trt.ui.gallery import Predicted

__all__ = ["pareto", "predicted"]

P = TypeVar("P", Point, SearchPoint)


def pareto(runtime: Runtime, studies: Studies, path: str, plan: Plan, *, guidance: float) -> Markup:
    """The first search, or else the first metric of the evaluations; ``plan`` is marked where it was measured.

    ``path``: the bundle as it was named, for the commands of what was not measured.
    """
    said: dict[str, Any] = {"fault": "", "metric": "", "plot": "", "value": None, "source": "", "cost": 0, "reason": ""}
    try:
        said["cost"] = predict_ms(find_calibration(runtime.bundle, Conditions.here(runtime.setup)), plan, batch=1)
    except BadInput as error:
        said["reason"] = error.message.partition("\n")[0]
    if studies.searches or studies.evaluations:
        try:
            require_matplotlib()
            said |= _measured(runtime, studies, plan, guidance)
        except Unavailable as error:
            said["fault"] = f"{error.message}; {error.hint}"
    commands = {word: shlex.join(("tstitch-trt", word, path)) for word in ("evaluate", "search", "calibrate")}
    return fill("ui/pareto.html", commands=commands, schedule=schedule_text(plan), steps=plan.steps, **said)


def predicted(runtime: Runtime, plans: Sequence[Plan], settings: Mapping[str, Any], batch: int) -> Predicted | None:
    """The time per image of each of ``plans``, drawn ``batch`` at a time; ``None`` without a calibration that covers
    them."""
    try:
        calibration = find_calibration(runtime.bundle, Conditions.here(runtime.setup))
        costs = [predict_ms(calibration, plan, batch=batch) for plan in (*plans, runtime.plan(fraction=0, **settings))]
    except BadInput:
        return None
    *each, alone = (cost / batch for cost in costs)
    return Predicted(each, alone, date(calibration))


def _measured(runtime: Runtime, studies: Studies, plan: Plan, guidance: float) -> dict[str, Any]:
    """The plot, and the metric and value of the chosen point."""
    for search in studies.searches[:1]:
        found = _chosen(search.points, plan, guidance)
        title = f"The search: {METRIC_NAMES.get(search.metric, search.metric)} against predicted time"
        return {
            "metric": search.metric,
            "value": found.quality if found else None,
            "source": f"search of {date(search)}, at most {search.samples:,} samples a point",
            "plot": svg("ui-pareto", title, partial(draw_search, study=search, chosen=found)) if search.points else "",
        }
    for metric, evaluation in [*by_metric(studies.evaluations).items()][:1]:
        point = _chosen([p for p in evaluation.points if metric in p.measures], plan, guidance)
        first, last = runtime.members[0], runtime.members[-1]
        draw = partial(draw_quality, evaluation=evaluation, metric=metric, first=first, last=last, chosen=point)
        title = f"{METRIC_NAMES.get(metric, metric)} against time per image"
        return {
            "metric": metric,
            "value": point.measures[metric] if point else None,
            "source": f"evaluation of {date(evaluation)}, {evaluation.samples:,} samples a point",
            "plot": svg("ui-pareto", title, draw) if timed(evaluation, metric) else "",
        }
    return {}


def _chosen(points: Iterable[P], plan: Plan, guidance: float) -> P | None:
    """The point that was measured as ``plan`` draws."""
    wanted = (schedule_text(plan), plan.steps, plan.solver.name, guidance)
    plain = ((point, point.setting) for point in points if not point.setting.plan)
    return next((p for p, s in plain if (s.schedule, s.rows, s.solver, s.guidance) == wanted), None)
