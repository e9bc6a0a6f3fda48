"""What a report says of the studies: quality, search, divergence, orders, cost."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from tstitch_trt.plots.markup import Markup, command, join, paragraph, table, tag
from tstitch_trt.plots.words import METRIC_NAMES, better, date, interval, machine_text, ms
from tstitch_trt.report.figures import (
    checks_figure,
    divergence_figure,
    orders_figure,
    quality_figure,
    search_figure,
    share_of,
)
from tstitch_trt.study.gather import Studies, evaluation_of, metrics_of, word_of
from tstitch_trt.study.records import Calibration, Divergence, Evaluation, Search, Study

__all__ = ["Context", "cost", "divergence", "missing", "orders", "quality", "searching", "section"]

S = TypeVar("S", bound=Study)


@dataclass(frozen=True)
class Context:
    """``bundle``: its path as it was given. ``first``, ``last``: the members that a fraction goes between."""

    bundle: str
    first: str
    last: str
    studies: Studies

    def command(self, name: str, *more: str) -> str:
        return shlex.join(("tstitch-trt", name, self.bundle, *more))


def section(key: str, title: str, *children: Markup | str | None) -> Markup:
    return tag("section", tag("h2", title, id=f"{key}-title"), *children, id=key, aria_labelledby=f"{key}-title")


def missing(text: str, fix: str) -> Markup:
    """What was not measured, and the command that measures it."""
    return tag("div", paragraph(text), command(fix), class_="missing")


def figure(drawn: Markup | None, caption: Markup | str) -> Markup | None:
    return None if drawn is None else tag("figure", tag("div", drawn, class_="canvas"), tag("figcaption", caption))


def quality(context: Context) -> Markup:
    found = context.studies.evaluations
    metrics = metrics_of(found)
    if not metrics:
        fix = context.command("evaluate")
        return section("quality", "Time and quality", missing("The quality of schedules was not measured yet.", fix))
    parts: list[Markup | None] = []
    shown: list[Evaluation] = []
    for index, metric in enumerate(metrics):
        evaluation = evaluation_of(found, metric)
        assert evaluation is not None
        shown.append(evaluation)
        level = f"{evaluation.level:.0%}"
        drawn = quality_figure(
            f"quality-{index}", evaluation, metric, first=context.first, last=context.last, wide=index == 0
        )
        caption = (
            f"{METRIC_NAMES.get(metric, metric)}, {better(metric)}, on {evaluation.samples:,} samples a point, with "
            f"{level} bootstrap intervals."
        )
        if index == 0:
            caption += f" At the points: the share of the steps on {context.first}, or the steps of one member alone."
        if drawn is None:
            parts.append(paragraph(f"{METRIC_NAMES.get(metric, metric)}: no point was timed.", class_="note"))
        parts.append(figure(drawn, caption))
    groups: dict[tuple[str, str], list[str]] = {}
    for metric, evaluation in zip(metrics, shown, strict=True):
        groups.setdefault((evaluation.made, evaluation.command), []).append(metric)
    by_study = {key: _joined([e for e in shown if (e.made, e.command) == key]) for key in groups}
    for key, names in groups.items():
        parts += [_points(context, by_study[key], names), _said(by_study[key]), _notes(by_study[key].notes)]
    others = [e for e in found if (e.made, e.command) not in by_study]
    parts.append(_others(others, lambda e: f"{e.samples:,} samples, {', '.join(e.metrics)}"))
    figures = [part for part in parts if part is not None and part.startswith("<figure")]
    rest = [part for part in parts if part is not None and not part.startswith("<figure")]
    head, tail = figures[:1], figures[1:]
    small = tag("div", *tail, class_="pair") if tail else None
    return section("quality", "Time and quality", *head, small, *rest)


def _joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One study as several metrics see it: with every point that has any of them."""
    points = {msgspec.json.encode(point.setting): point for found in evaluations for point in found.points}
    return msgspec.structs.replace(evaluations[0], points=tuple(points.values()))


def _points(context: Context, evaluation: Evaluation, metrics: Sequence[str]) -> Markup:
    rows = []
    for point in evaluation.points:
        setting = point.setting
        timed = bool(point.ms and point.batch)
        rows.append(
            [
                f"{share_of(setting, context.first):.0%}",
                tag("code", setting.schedule),
                setting.solver,
                f"{setting.guidance:g}",
                f"{setting.steps}",
                ms(point.ms / point.batch) if timed else "–",
                *(interval(point.measures[name]) if name in point.measures else "–" for name in metrics),
            ]
        )
    names = [METRIC_NAMES.get(name, name) for name in metrics]
    header = [f"on {context.first}", "schedule", "solver", "guidance", "steps", "ms/image", *names]
    features, reference = _described(evaluation.features, "wide"), _described(evaluation.reference, "images")
    caption = f"{evaluation.samples:,} samples a point, seed {evaluation.seed}"
    for column in ("guidance", "solver"):  # said once where it is the same for all
        index = header.index(column)
        if len({row[index] for row in rows}) == 1:
            caption += f", {column} {rows[0][index]}"
            header, rows = header[:index] + header[index + 1 :], [row[:index] + row[index + 1 :] for row in rows]
    caption += f"; features: {features}" if features else ""
    caption += f"; reference: {reference}" if reference else ""
    caption += f"; [{evaluation.level:.0%} interval of {evaluation.resamples:,} resamples]"
    return table(header, rows, caption=caption)


def _described(facts: dict[str, str | int], counted: str) -> str:
    """``held-out.npz, 10,000 images``, the hash left out."""
    said = [str(facts["name"])] if facts.get("name") else []
    said += [f"{facts['count']:,} {counted}"] if isinstance(facts.get("count"), int) else []
    return ", ".join(said)


def searching(context: Context) -> Markup:
    found = context.studies.searches
    if not found:
        fix = context.command("search")
        return section("search", "Search", missing("The choice between schedules was not searched yet.", fix))
    newest = found[0]
    front = sorted((point for point in newest.points if point.front), key=lambda point: point.cost_ms)
    rows = [
        [
            tag("code", point.setting.schedule),
            point.kind,
            point.setting.solver,
            f"{point.setting.steps}",
            f"{point.setting.guidance:g}",
            ms(point.cost_ms),
            interval(point.quality),
            f"{point.samples:,}",
        ]
        for point in front
    ]
    metric = METRIC_NAMES.get(newest.metric, newest.metric)
    header = ("schedule", "kind", "solver", "steps", "guidance", "predicted ms", metric, "samples")
    caption = (
        f"{len(newest.points)} settings, judged by {metric} ({better(newest.metric)}) on at most {newest.samples:,} "
        "samples. Filled: on the front; faint: dropped early. Fewer samples raise distances, so these values compare "
        "with each other only, not with those above."
    )
    return section(
        "search",
        "Search",
        figure(search_figure("search-0", newest), caption),
        table(header, rows, caption=f"The front, which --budget-ms chooses from; times for a batch of {newest.batch}"),
        _said(newest),
        _notes(newest.notes),
        _others(found[1:], lambda s: f"{s.metric}, batch {s.batch}, {s.samples:,} samples"),
    )


def divergence(context: Context) -> Markup:
    found = context.studies.divergences
    if not found:
        fix = context.command("profile")
        text = "How far the members' estimates are from each other was not measured yet."
        return section("divergence", "Divergence", missing(text, fix))
    newest = found[0]
    caption = (
        f"Members side by side at the states of {newest.reference}'s trajectory: relative L2 of the denoised "
        f"estimate, median over {len(newest.seeds)} seeds, p10 to p90 shaded. {newest.steps} {newest.solver} steps, "
        f"guidance {newest.guidance:g}."
    )
    suggested = tag(
        "p", "Suggested: ", tag("code", newest.suggested), f" (order {newest.order}). {newest.reason}", class_="callout"
    )
    return section(
        "divergence",
        "Divergence",
        figure(divergence_figure("divergence-0", newest), caption),
        suggested,
        _said(newest),
        _others(found[1:], _divergence_words),
    )


def _divergence_words(study: Divergence) -> str:
    return f"{study.steps} {study.solver} steps, guidance {study.guidance:g}, from {study.reference}"


def orders(context: Context) -> Markup:
    found = [study for study in context.studies.divergences if study.orders]
    if not found:
        fix = context.command("profile")
        return section("orders", "Order of the members", missing("No order of the members was tried yet.", fix))
    newest = found[0]
    rows = [
        [trial.order, tag("code", trial.schedule), f"{trial.latent_error:.3g}", f"{trial.p10:.3g}", f"{trial.p90:.3g}"]
        for trial in newest.orders
    ]
    caption = (
        f"Schedules that were really run: relative L2 of the final latents from those of {newest.reference} alone with "
        f"the same seeds, median over {len(newest.seeds)} seeds, the line from p10 to p90. Lower is closer."
    )
    return section(
        "orders",
        "Order of the members",
        figure(orders_figure("orders-0", newest.orders), caption),
        table(("order", "schedule", "latent error", "p10", "p90"), rows),
    )


def cost(context: Context) -> Markup:
    found = context.studies.calibrations
    if not found:
        fix = context.command("calibrate")
        return section("cost", "Cost model", missing("The cost of a step was not measured on any machine yet.", fix))
    parts = [_calibration(study, f"checks-{index}", index == 0) for index, study in enumerate(found)]
    return section("cost", "Cost model", *parts)


def _calibration(study: Calibration, name: str, newest: bool) -> Markup:
    rows = [
        [s.member, "yes" if s.guided else "no", f"{s.batch}", f"{s.height}×{s.width}", ms(s.ms), ms(s.p10_ms),
         ms(s.p90_ms), f"{s.blocks}"]
        for s in study.steps
    ]  # fmt: skip
    more = [[f"{o.batch}", f"{o.height}×{o.width}", ms(o.ms), ms(o.switch_ms)] for o in study.overheads]
    where = f"{study.backend} on {study.device}"
    where += f", {study.threads} thread{'s' if study.threads > 1 else ''}" if study.threads else ""
    tables = tag(
        "div",
        table(
            ("member", "guided", "batch", "latent", "ms/step", "p10", "p90", "blocks"),
            rows,
            caption="One step: prepare, engine, advance",
        ),
        table(("batch", "latent", "once, ms", "per switch, ms"), more, caption="A trajectory beside its steps"),
    )
    drawn = None
    if study.checks:
        caption = (
            f"{len(study.checks)} random schedules that the model was not fitted on: median error "
            f"{study.median_error:.1%}, worst {study.worst_error:.1%}."
        )
        drawn = figure(checks_figure(name, study.checks), caption)
    body = join(
        (
            paragraph("time = sum of the members' steps + overhead", class_="formula"),
            tag("div", drawn, tables, class_="pair") if drawn else tables,
            paragraph(
                f"A budget is compared with the prediction × {study.upper_ratio:.3f}, the 98th percentile of measured "
                "over predicted time of single runs.",
                class_="note",
            ),
            _said(study),
        )
    )
    if newest:
        return join((paragraph(where, class_="where"), body))
    return tag("details", tag("summary", f"{where}, {machine_text(study.machine)}, {date(study)}"), body)


def _said(study: Evaluation | Search | Divergence | Calibration) -> Markup:
    """Where and when a study was made, and its prompts."""
    prompts = () if isinstance(study, Calibration) else study.prompts
    listed = tag("details", tag("summary", f"{len(prompts)} prompts"), tag("ul", *(tag("li", p) for p in prompts)))
    return join(
        (
            paragraph(f"Made on {date(study)} on {machine_text(study.machine)}.", class_="made"),
            listed if prompts else None,
        )
    )


def _notes(notes: Sequence[str]) -> Markup | None:
    return tag("ul", *(tag("li", note) for note in notes), class_="warnings") if notes else None


def _others(studies: Sequence[S], words: Callable[[S], str]) -> Markup | None:
    """Further studies of the same weights, under other conditions: named, not mixed in."""
    if not studies:
        return None
    rows = [[date(study), words(study), tag("code", study.command)] for study in studies]
    name = word_of(studies[0])
    summary = tag("summary", f"{len(rows)} more {name}{'s' if len(rows) > 1 else ''} under other conditions")
    return tag("details", summary, table(("made", "conditions", "command"), rows))
