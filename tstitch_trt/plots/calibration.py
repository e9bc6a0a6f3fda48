"""The plots of a calibration: what a step costs, and predicted against measured times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tstitch_trt.plots.figure import MUTED, figure, point
from tstitch_trt.plots.words import ms
from tstitch_trt.study.records import Calibration

__all__ = ["draw_checks", "draw_steps", "plot_calibration"]


def plot_calibration(path: Path, calibration: Calibration) -> None:
    """Both drawings side by side as a PNG."""
    with figure(path, columns=2, size=(10.4, 4.2)) as (left, right):
        draw_steps(left, calibration)
        left.set_title(f"{calibration.bundle}: {calibration.backend} on {calibration.device}")
        draw_checks(right, calibration)
        right.set_title(f"error: median {calibration.median_error:.1%}, worst {calibration.worst_error:.1%}")


def draw_steps(axes: Any, calibration: Calibration) -> None:
    """Step cost against the batch, p10 to p90 shaded."""
    curves = dict.fromkeys((cost.member, cost.guided, cost.width, cost.height) for cost in calibration.steps)
    several = len({curve[2:] for curve in curves}) > 1
    for name, guided, width, height in curves:
        own = sorted(
            (cost.batch, cost.ms, cost.p10_ms, cost.p90_ms)
            for cost in calibration.steps
            if (cost.member, cost.guided, cost.width, cost.height) == (name, guided, width, height)
        )
        batches, middle, low, high = zip(*own, strict=True)
        label = f"{name}{', guided' if guided else ''}{f', {width}x{height}' if several else ''}"
        (line,) = axes.plot(batches, middle, marker="o", label=label)
        axes.fill_between(batches, low, high, alpha=0.2, color=line.get_color())
    axes.set_xlabel("images per engine call")
    axes.set_ylabel("ms per step")
    axes.set_ylim(bottom=0)


def draw_checks(axes: Any, calibration: Calibration) -> None:
    """Predicted against measured time of schedules that the model was not fitted on; the line is equality."""
    checks = calibration.checks
    most = max(max(check.predicted_ms, check.measured_ms) for check in checks) * 1.06
    least = min(min(check.predicted_ms, check.measured_ms) for check in checks) / 1.06
    wide = most / least > 30
    if wide:
        axes.set_xscale("log")
        axes.set_yscale("log")
    low = least if wide else 0
    within = ([low * 0.95, most * 0.95], [low * 1.05, most * 1.05])
    axes.fill_between([low, most], *within, color=MUTED, alpha=0.13, linewidth=0, label="within 5 %")
    axes.plot([low, most], [low, most], color=MUTED, linewidth=1, label="equal")
    for check in checks:
        text = (
            f"{check.schedule}, {check.steps} steps, batch {check.batch}: predicted {ms(check.predicted_ms)} ms, "
            f"measured {ms(check.measured_ms)} ms ({check.error:+.1%})"
        )
        point(axes, check.measured_ms, check.predicted_ms, text, color="C0", alpha=0.85)
    axes.set_xlim(low, most)
    axes.set_ylim(low, most)
    axes.set_xlabel("measured ms")
    axes.set_ylabel("predicted ms")
