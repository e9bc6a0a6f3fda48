"""The plot of a search: cost and quality of all candidates, the Pareto front among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch_trt.plots.figure import GROUND, INK, error_bars, figure, point, series
from tstitch_trt.plots.words import interval, metric_axis, ms
from tstitch_trt.study.records import Search, SearchPoint, Setting

__all__ = ["draw_search", "plot_search", "ring"]


def plot_search(path: Path, study: Search) -> None:
    """The drawing as a PNG."""
    last = max(study.points, key=lambda point: point.setting.rows).setting
    with figure(path, size=(8.0, 5.2)) as axes:
        draw_search(axes, study)
        axes.set_title(
            f"{study.bundle}, guidance {last.guidance:g}: {len(study.points)} candidates on at most "
            f"{study.samples} samples (95 % intervals)"
        )


def draw_search(axes: Any, study: Search, *, chosen: SearchPoint | None = None) -> None:
    """Cost against quality, families by colour: filled on the front, pale where dropped early, at the value that they
    had then. The line is the front. ``chosen`` is ringed."""
    front = sorted((p for p in study.points if p.front), key=lambda p: p.cost_ms)
    costs, values = [p.cost_ms for p in front], [p.quality.value for p in front]
    axes.plot(costs, values, color=INK, linewidth=1.3, label="Pareto front", zorder=2)
    for index, kind in enumerate(dict.fromkeys(p.kind for p in study.points)):
        look = series(index)
        axes.plot([], [], **look, linestyle="none", label=kind)
        own = [p for p in study.points if p.kind == kind]
        judged = [p for p in own if not p.dropped]
        error_bars(
            axes, [p.cost_ms for p in judged], [p.quality for p in judged], color=look["color"], linestyle="none"
        )
        for p in own:
            text = (
                f"{p.setting.schedule}, {p.setting.steps} {p.setting.solver} steps: {ms(p.cost_ms)} ms predicted, "
                f"{interval(p.quality)} on {p.samples} samples"
                f"{', dropped early' if p.dropped else ''}{', on the front' if p.front else ''}"
            )
            fill = {} if p.front else {"markerfacecolor": GROUND}
            point(axes, p.cost_ms, p.quality.value, text, alpha=0.45 if p.dropped else 1, **look, **fill)
    if chosen is not None:
        ring(axes, chosen.cost_ms, chosen.quality.value, chosen.setting)
    axes.set_xlabel(f"predicted ms for a batch of {study.batch}")
    axes.set_ylabel(metric_axis(study.metric))
    axes.margins(x=0.06, y=0.12)
    axes.set_xlim(left=0)


def ring(axes: Any, x: float, y: float, setting: Setting) -> None:
    """Marks a chosen point."""
    text = f"chosen: {setting.schedule}, {setting.steps} steps"
    look = {"color": INK, "markerfacecolor": "none", "markersize": 13, "markeredgewidth": 1.6}
    point(axes, x, y, text, **look, label="chosen", zorder=5)
