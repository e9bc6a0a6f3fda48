"""The plot beside the pictures: what the studies measured, with the chosen point marked."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TypeVar

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.plan.plan import Plan
from tstitch_trt.plots.markup import Markup, command, join, paragraph, tag
from tstitch_trt.plots.svg import require_matplotlib
from tstitch_trt.plots.words import METRIC_NAMES, date, interval, ms
from tstitch_trt.report.figures import quality_figure, search_figure
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.budget import Conditions, find_calibration, predict_ms
from tstitch_trt.study.gather import Studies, evaluation_of, metrics_of
from tstitch_trt.study.records import Point, SearchPoint, Setting

__all__ = ["pareto"]

P = TypeVar("P", Point, SearchPoint)


def pareto(runtime: Runtime, studies: Studies, path: str, plan: Plan, *, guidance: float) -> Markup:
    """The newest search, or else the first metric of the evaluations; ``plan`` is marked where it was measured.

    ``path``: the bundle as it was named, for the commands of what was not measured.
    """
    members = runtime.members
    said = [_predicted(runtime, path, plan)]
    figure: Markup | None = None
    if studies.searches:
        search = studies.searches[0]
        found = _chosen(search.points, plan, guidance)
        if (fault := _no_plots()) is not None:
            return join((fault, *said))
        figure = search_figure("ui-pareto", search, chosen=found)
        source = f"search of {date(search)}, at most {search.samples:,} samples a point"
        metric, value = search.metric, found.quality if found else None
    elif metrics := metrics_of(studies.evaluations):
        metric = metrics[0]
        evaluation = evaluation_of(studies.evaluations, metric)
        assert evaluation is not None
        point = _chosen([p for p in evaluation.points if metric in p.measures], plan, guidance)
        if (fault := _no_plots()) is not None:
            return join((fault, *said))
        figure = quality_figure(
            "ui-pareto", evaluation, metric, first=members[0], last=members[-1], wide=False, chosen=point
        )
        source = f"evaluation of {date(evaluation)}, {evaluation.samples:,} samples a point"
        value = point.measures[metric] if point else None
    else:
        words = ("evaluate", "search")
        fixes = [command(shlex.join(("tstitch-trt", word, path))) for word in words]
        return join((paragraph("The quality of schedules was not measured yet:"), *fixes, *said))
    name = METRIC_NAMES.get(metric, metric)
    quality = f"{name} {interval(value)}" if value is not None else f"{name}: this schedule was not measured"
    chosen = paragraph("Chosen: ", tag("code", counts_text(plan)), f", {plan.steps} steps. {quality}.")
    return join((figure, chosen, *said, paragraph(f"From the {source}.", class_="note")))


def counts_text(plan: Plan) -> str:
    """The schedule by counts: ``small:20,large:30``."""
    return ",".join(f"{part.name}:{part.stop - part.start}" for part in plan.schedule.segments)


def _chosen(points: Iterable[P], plan: Plan, guidance: float) -> P | None:
    """The point that was measured as ``plan`` draws."""
    return next((point for point in points if _same(point.setting, plan, guidance)), None)


def _same(setting: Setting, plan: Plan, guidance: float) -> bool:
    return (
        setting.schedule == counts_text(plan)
        and setting.rows == plan.steps
        and setting.solver == plan.solver.name
        and setting.guidance == guidance
        and not setting.plan
    )


def _predicted(runtime: Runtime, path: str, plan: Plan) -> Markup:
    """What one image costs by the calibration of this machine."""
    try:
        cost = predict_ms(find_calibration(runtime.bundle, Conditions.here(runtime.setup)), plan, batch=1)
    except BadInput as error:
        first = error.message.partition("\n")[0]
        return paragraph(
            f"No prediction of the time: {first}. ", tag("code", f"tstitch-trt calibrate {shlex.quote(path)}")
        )
    return paragraph(f"Predicted: {ms(cost)} ms for one image.")


def _no_plots() -> Markup | None:
    try:
        require_matplotlib()
    except Unavailable as error:
        return paragraph(f"{error.message}; {error.hint}")
    return None
