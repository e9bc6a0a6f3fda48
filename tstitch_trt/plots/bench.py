"""The plot of a bench: time against the share of the steps on the first member."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_trt.plots.figure import figure

if TYPE_CHECKING:
    from tstitch_trt.bench.bench import Bench

__all__ = ["draw_bench", "plot_bench"]


def plot_bench(path: Path, bench: Bench) -> None:
    """The drawing as a PNG."""
    with figure(path) as axes:
        draw_bench(axes, bench)


def draw_bench(axes: Any, bench: Bench) -> None:
    """Trajectory time against the fraction: measured (median, p10 to p90), predicted, and the baseline if there."""
    runs = sorted(bench.trajectories, key=lambda t: t.fraction)
    x = [t.fraction for t in runs]
    errors = [[t.ms - t.p10_ms for t in runs], [t.p90_ms - t.ms for t in runs]]
    axes.errorbar(x, [t.ms for t in runs], errors, marker="o", capsize=3, label="measured (median, p10 to p90)")
    axes.plot(x, [t.predicted_ms for t in runs], "--", label="predicted from bare engine times")
    if bench.against is not None:
        others = sorted(bench.against.trajectories, key=lambda t: t.fraction)
        axes.plot(x, [t.ms for t in others], marker="s", label=bench.against.name)
    axes.set_xlabel("share of the steps on the first member")
    axes.set_ylabel(f"ms per trajectory of {bench.batch} images")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{bench.bundle}: {bench.steps} steps, {bench.backend} on {bench.device}")
