"""The plot of a search: cost and quality of all candidates, the Pareto set among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch_trt.plots.figure import figure
from tstitch_trt.study.records import Search
from tstitch_trt.study.search.candidates import KINDS

__all__ = ["draw_search", "plot_search"]

_MARKERS = dict(zip(KINDS, "sDo^v", strict=True))


def plot_search(path: Path, study: Search) -> None:
    """All candidates as one PNG."""
    with figure(path, size=(8.0, 5.2)) as axes:
        draw_search(axes, study)


def draw_search(axes: Any, study: Search) -> None:
    """Families by colour; dropped candidates pale, at the value that they had then; a line along the front."""
    last = max(study.points, key=lambda point: point.setting.rows).setting
    for index, kind in enumerate(KINDS):
        points = [point for point in study.points if point.kind == kind]
        named = False
        for dropped in (False, True):
            part = [point for point in points if point.dropped == dropped]
            if not part:
                continue
            values = [point.quality.value for point in part]
            reach = [
                [max(p.quality.value - p.quality.low, 0.0) for p in part],
                [max(p.quality.high - p.quality.value, 0.0) for p in part],
            ]
            axes.errorbar(
                [point.cost_ms for point in part],
                values,
                None if dropped else reach,
                linestyle="none",
                marker=_MARKERS[kind],
                capsize=2,
                color=f"C{index}",
                alpha=0.3 if dropped else 0.9,
                label=None if named else kind,
            )
            named = True
    best = sorted((point for point in study.points if point.front), key=lambda point: point.cost_ms)
    axes.plot([p.cost_ms for p in best], [p.quality.value for p in best], color="black", linewidth=1, label="front")
    axes.set_xscale("log")
    axes.set_xlabel(f"predicted ms of {study.batch} images")
    axes.set_ylabel(f"{study.metric} of {study.samples} samples (95 % intervals; pale: dropped with fewer)")
    axes.set_title(f"{study.bundle}, guidance {last.guidance:g}: {len(study.points)} candidates")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
