"""The plots of an evaluation: each metric against the first member's share, and against the time per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tstitch_trt.plots.figure import MUTED, error_bars, figure, point, series
from tstitch_trt.plots.search import ring
from tstitch_trt.plots.words import METRIC_NAMES, family_of, interval, metric_axis, ms, order_of
from tstitch_trt.study.noninferiority import margin_of
from tstitch_trt.study.records import HIGHER_IS_BETTER, PAIRED, Evaluation, Point, Setting
from tstitch_trt.study.settings import ORDERS, share_in_order

__all__ = ["draw_quality", "draw_shares", "plot_evaluation", "timed"]

_COLUMNS = 4


def plot_evaluation(path: Path, evaluation: Evaluation, members: Sequence[str]) -> None:
    """A row of panels against the first member's share, one per metric, and one of the first metric against time."""
    metrics = [name for name in evaluation.metrics if any(name in point.measures for point in evaluation.points)]
    times = bool(metrics) and bool(timed(evaluation, metrics[0]))
    panels = max(1, len(metrics) + times)
    columns = min(panels, _COLUMNS)
    rows = -(-panels // columns)
    with figure(path, rows=rows, columns=columns, size=(4.8 * columns, 3.9 * rows)) as made:
        axes = list(np.ravel(made))
        for axis, metric in zip(axes, metrics, strict=False):
            draw_shares(axis, evaluation, metric, members)
        if times:
            draw_quality(axes[panels - 1], evaluation, metrics[0], first=members[0], last=members[-1])
        for axis in axes[panels:]:
            axis.set_visible(False)
        axes[0].set_title(f"{evaluation.bundle}: {evaluation.samples} samples")


def draw_shares(axes: Any, evaluation: Evaluation, metric: str, members: Sequence[str]) -> None:
    """``metric`` against the share of the steps on the first member: one line per order, solver and step count."""
    lines: dict[str, list[tuple[float, Point]]] = {}
    for found in evaluation.points:
        if metric in found.measures:
            setting = found.setting
            for order in ORDERS:
                if (share := share_in_order(setting, members, order)) is not None:
                    lines.setdefault(f"{setting.solver} {setting.steps}, {order}", []).append((share, found))
    several = {label: points for label, points in lines.items() if len(points) > 1}
    for label, points in (several or lines).items():  # one member alone at other step counts is no line
        points.sort(key=lambda pair: pair[0])
        measures = [found.measures[metric] for _, found in points]
        error_bars(axes, [share for share, _ in points], measures, marker="o", markersize=4, label=label)
    _draw_margin(axes, evaluation, metric, evaluation.points, members[-1])
    axes.set_xlabel(f"share of the steps on {members[0]!r}")
    axes.set_ylabel(metric_axis(metric))


def _draw_margin(axes: Any, evaluation: Evaluation, metric: str, points: Sequence[Point], last: str) -> None:
    """The band from ``last`` alone, in the most steps of ``points``, to how much worse is still no worse."""
    alone = [found for found in points if order_of(found.setting) == (last,) and metric in found.measures]
    if metric in PAIRED or not alone:
        return
    base = max(alone, key=lambda found: found.setting.rows).measures[metric]
    most = margin_of(base, evaluation.margin)
    if most > 0 and base.deviations:
        reach = base.value + (-most if metric in HIGHER_IS_BETTER else most)
        text = f"margin of {last} alone, {evaluation.margin:.0%}"
        axes.axhspan(*sorted((base.value, reach)), color=MUTED, alpha=0.13, linewidth=0, label=text)


def timed(evaluation: Evaluation, metric: str) -> list[Point]:
    """The points that have ``metric`` and a time."""
    return [point for point in evaluation.points if metric in point.measures and point.ms and point.batch]


def draw_quality(
    axes: Any,
    evaluation: Evaluation,
    metric: str,
    *,
    first: str,
    last: str,
    annotated: bool = False,
    chosen: Point | None = None,
) -> None:
    """``metric`` of the ``timed`` points against the milliseconds per image: one line per family of settings.

    The band reaches from ``last`` alone at its most steps to the margin. ``annotated``: with the share of the steps on
    ``first`` beside each point. ``chosen`` is ringed.
    """
    points = timed(evaluation, metric)
    notes = []
    _draw_margin(axes, evaluation, metric, points, last)
    for index, (label, family) in enumerate(_families(points, first=first, last=last).items()):
        look, x = series(index), [found.ms / found.batch for found in family]
        stitched = any(len(order_of(found.setting)) > 1 for found in family)
        line = "-" if len(family) > 2 else "none"
        error_bars(axes, x, [p.measures[metric] for p in family], **look, linestyle=line, label=label, zorder=3)
        for found, across in zip(family, x, strict=True):
            setting, measure = found.setting, found.measures[metric]
            text = (
                f"{setting.schedule}, {setting.steps} {setting.solver} steps: {ms(across)} ms per image, "
                f"{METRIC_NAMES.get(metric, metric)} {interval(measure)}"
            )
            point(axes, across, measure.value, text, **look, zorder=4)
            short = f"{setting.share(first):.0%}" if stitched else f"{setting.steps} steps"
            notes.append((across, measure.value, short, stitched))
    if chosen is not None and chosen.ms and chosen.batch:
        ring(axes, chosen.ms / chosen.batch, chosen.measures[metric].value, chosen.setting)
    batches = sorted({found.batch for found in points})
    axes.set_xlabel(f"ms per image, batch of {' or '.join(map(str, batches))}")
    axes.set_ylabel(metric_axis(metric))
    axes.margins(x=0.06, y=0.12)
    axes.set_xlim(left=0)
    if annotated:
        _annotate(axes, notes)


def _families(points: Sequence[Point], *, first: str, last: str) -> dict[str, list[Point]]:
    """Points by family, in the order of their cost. The ends of a family of fractions, ``first`` and ``last`` alone at
    the same steps, belong to it; ``last`` alone at several step counts is a family too: plain step reduction."""
    groups: dict[str, list[Point]] = {}
    for found in points:
        groups.setdefault(family_of(found.setting), []).append(found)
    stitched = {label: kept for label, kept in groups.items() if len(order_of(kept[0].setting)) > 1}
    alone = {label: kept for label, kept in groups.items() if label not in stitched}
    taken: set[int] = set()
    for kept in stitched.values():
        if order_of(kept[0].setting) == (first, last):
            ends = [p for group in alone.values() for p in group if _end_of(p.setting, kept[0].setting)]
            kept += ends
            taken |= {id(found) for found in ends}
    for label, kept in alone.items():
        several = len({found.setting.steps for found in kept}) > 1
        if several or not all(id(found) in taken for found in kept):
            named = f"{label}, fewer steps" if several and order_of(kept[0].setting) == (last,) else label
            stitched[named] = kept
    return {label: sorted(kept, key=lambda p: p.ms / p.batch) for label, kept in stitched.items()}


def _end_of(setting: Setting, family: Setting) -> bool:
    return (
        len(order_of(setting)) == 1
        and next(iter(setting.members)) in family.members
        and (setting.steps, setting.solver, setting.guidance) == (family.steps, family.solver, family.guidance)
        and setting.plan == family.plan
    )


def _annotate(axes: Any, notes: Sequence[tuple[float, float, str, bool]]) -> None:
    """Texts beside points, to the upper right or (``below``) to the lower left; one that would lie on another is left
    out."""
    axes.figure.draw_without_rendering()  # limits and layout are settled by drawing
    placed: list[tuple[float, float, float]] = []
    for x, y, text, below in notes:
        across, up = 0.72 * axes.transData.transform((x, y))  # pixels are 1/100 inch, points 1/72
        width = 5.2 * len(text)
        across, up = (across - width, up - 12) if below else (across, up + 5)
        if all(across > a + w or a > across + width or abs(up - b) > 10 for a, b, w in placed):
            placed.append((across, up, width))
            offset, side = ((-4, -11), "right") if below else ((5, 5), "left")
            axes.annotate(
                text,
                (x, y),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                color=MUTED,
                fontsize="small",
                zorder=5,
            )
