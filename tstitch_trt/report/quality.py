"""What evaluations say on a page: a plot per metric, and a table per study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from markupsafe import Markup

from tstitch_trt.plots.evaluation import draw_quality, timed
from tstitch_trt.plots.svg import NARROW, WIDE, svg
from tstitch_trt.plots.words import METRIC_NAMES, better, interval, ms
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.gather import Studies, by_metric
from tstitch_trt.study.records import PAIRED, Evaluation

__all__ = ["Plot", "Quality", "Table", "quality_of"]


@dataclass(frozen=True)
class Plot:
    drawing: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]
    caption: str
    study: Evaluation


@dataclass(frozen=True)
class Quality:
    """``untimed``: metrics without a plot, as no point has a time. ``claims``: what follows, or why nothing does.

    ``others``: studies under other conditions, those with the most samples first.
    """

    metrics: list[str]
    plots: list[Plot]
    untimed: list[str]
    claims: list[str]
    tables: list[Table]
    others: list[Table]


def quality_of(studies: Studies, first: str, last: str) -> Quality:
    """``first``, ``last``: the members that a fraction goes between."""
    found = studies.evaluations
    by_name = by_metric(found)
    plots, untimed = [], []
    groups: dict[tuple[str, str], dict[str, Evaluation]] = {}
    for index, (metric, evaluation) in enumerate(by_name.items()):
        groups.setdefault((evaluation.made, evaluation.command), {})[metric] = evaluation
        name, wide = METRIC_NAMES.get(metric, metric), index == 0
        if not timed(evaluation, metric):
            untimed.append(metric)
            continue
        drawing = svg(
            f"quality-{index}",
            f"{name} against time per image",
            partial(draw_quality, evaluation=evaluation, metric=metric, first=first, last=last, annotated=wide),
            size=WIDE if wide else NARROW,
        )
        caption = (
            f"{name}, {better(metric)}, on {evaluation.samples:,} samples a point, with {evaluation.level:.0%} "
            "bootstrap intervals."
        )
        if metric in PAIRED:
            steps = max((reference.steps for reference in evaluation.references), default=0)
            caption += f" Compared with {last} alone in {steps} steps, from the same seeds." if steps else ""
        if wide:
            caption += f" At the points: the share of the steps on {first}, or the steps of one member alone."
        plots.append(Plot(drawing, caption))
    tables = [_table(_joined(list(group.values())), list(group), first) for group in groups.values()]
    others = sorted((e for e in found if (e.made, e.command) not in groups), key=lambda e: -e.samples)
    claims = []
    for metric, evaluation in by_name.items():
        name = METRIC_NAMES.get(metric, metric)
        claims += [claim.text(first, last, name) for claim in claims_of(evaluation, (first, last), metric)]
        if claims:  # of the first metric that says how good pictures are
            break
    return Quality(
        list(by_name), plots, untimed, claims, tables, [_table(other, list(other.metrics), first) for other in others]
    )


def _joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One study as several metrics see it: with every point that has any of them."""
    points = {msgspec.json.encode(point.setting): point for found in evaluations for point in found.points}
    return msgspec.structs.replace(evaluations[0], points=tuple(points.values()))


def _table(evaluation: Evaluation, metrics: Sequence[str], first: str) -> Table:
    rows = []
    for point in evaluation.points:
        setting = point.setting
        time = ms(point.ms / point.batch) if point.ms and point.batch else "–"
        values = (interval(point.measures[name]) if name in point.measures else "–" for name in metrics)
        share = f"{setting.share(first):.0%}"
        how = [setting.schedule, setting.solver, f"{setting.guidance:g}", f"{setting.steps}"]
        rows.append([share, *how, time, *values])
    names = [METRIC_NAMES.get(name, name) for name in metrics]
    header = [f"on {first}", "schedule", "solver", "guidance", "steps", "ms/image", *names]
    caption = f"{evaluation.samples:,} samples a point, seed {evaluation.seed}"
    for column in ("guidance", "solver"):  # in the caption where it is the same for all
        index = header.index(column)
        if len({row[index] for row in rows}) == 1:
            caption += f", {column} {rows[0][index]}"
            header, rows = header[:index] + header[index + 1 :], [row[:index] + row[index + 1 :] for row in rows]
    features, reference = _described(evaluation.features, "wide"), _described(evaluation.reference, "images")
    caption += f"; features: {features}" if features else ""
    caption += f"; reference: {reference}" if reference else ""
    caption += f"; [{evaluation.level:.0%} interval of {evaluation.resamples:,} resamples]"
    return Table(header, rows, caption, evaluation)


def _described(facts: dict[str, str | int], counted: str) -> str:
    """``held-out.npz, 10,000 images``, without the hash."""
    said = [str(facts["name"])] if facts.get("name") else []
    said += [f"{facts['count']:,} {counted}"] if isinstance(facts.get("count"), int) else []
    return ", ".join(said)
