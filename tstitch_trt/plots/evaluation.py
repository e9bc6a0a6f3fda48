"""Plots of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tstitch_trt.plots.figure import figure
from tstitch_trt.study.records import Evaluation, Point
from tstitch_trt.study.settings import ORDERS, share_in_order

__all__ = ["plot_evaluation"]

_COLUMNS = 4
_AXES = {"fid": "Fréchet distance", "kid": "kernel distance", "psnr": "PSNR, dB", "latent_error": "latent error"}


def plot_evaluation(path: Path, evaluation: Evaluation, members: Sequence[str]) -> None:
    """A row of panels against the first member's share, one per metric, and one of the first metric against time."""
    metrics = [name for name in evaluation.metrics if any(name in point.measures for point in evaluation.points)]
    timed = [point for point in evaluation.points if point.ms]
    panels = max(1, len(metrics) + bool(timed))
    columns = min(panels, _COLUMNS)
    rows = -(-panels // columns)
    with figure(path, rows=rows, columns=columns, size=(4.8 * columns, 3.9 * rows)) as made:
        axes = list(np.ravel(made))
        for axis, metric in zip(axes, metrics, strict=False):
            _draw(axis, evaluation.points, members, metric, timed=False)
        if timed and metrics:
            _draw(axes[panels - 1], timed, members, metrics[0], timed=True)
        for axis in axes[panels:]:
            axis.set_visible(False)
        axes[0].set_title(f"{evaluation.bundle}: {evaluation.samples} samples")


def _draw(axis: Any, points: Sequence[Point], members: Sequence[str], metric: str, *, timed: bool) -> None:
    lines: dict[str, list[tuple[float, Point]]] = {}
    for point in points:
        if metric not in point.measures:
            continue
        setting = point.setting
        family = f"{setting.solver} {setting.steps}"
        shares = [(order, share_in_order(setting, members, order)) for order in ORDERS]
        for order, share in shares:
            if share is not None:
                lines.setdefault(f"{family}, {order}", []).append((point.ms if timed else share, point))
        if not timed or any(share is not None for _, share in shares):
            continue
        lines.setdefault(f"{family}, {setting.schedule}", []).append((point.ms, point))
    if not timed and any(len(found) > 1 for found in lines.values()):  # one member alone at other step counts: no line
        lines = {label: found for label, found in lines.items() if len(found) > 1}
    for label, found in lines.items():
        found.sort(key=lambda pair: pair[0])
        measures = [point.measures[metric] for _, point in found]
        values = [m.value for m in measures]
        errors = [[m.value - m.low for m in measures], [m.high - m.value for m in measures]]
        axis.errorbar([x for x, _ in found], values, errors, marker="o", markersize=4, capsize=2, label=label)
    axis.set_xlabel(f"ms per batch of {points[0].batch}" if timed else f"share of the steps on {members[0]!r}")
    axis.set_ylabel(_AXES.get(metric, metric))
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize="small")
