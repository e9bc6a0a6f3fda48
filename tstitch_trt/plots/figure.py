"""Plots of measurements, by matplotlib (the extra ``plot``), drawn without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.files import atomic_file, require_parent

if TYPE_CHECKING:
    from tstitch_trt.bench.bench import Bench
    from tstitch_trt.study.records import Calibration

__all__ = ["check_plot", "figure", "plot_bench", "plot_calibration"]


def check_plot(path: Path, *, option: str = "--plot") -> None:
    """Raises at once what would otherwise go wrong after minutes of measuring: suffix, folder, matplotlib."""
    if path.suffix.lower() != ".png":
        raise BadInput(
            f"{option} {str(path)!r}: plots can't be written as {path.suffix or 'a file without suffix'!r}; "
            "allowed: .png",
            hint=f"write {option} {path.with_suffix('.png')}",
        )
    require_parent(path, option=option)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Unavailable(
            "plots need matplotlib, which is not installed", hint='run: pip install "tstitch-trt[plot]"'
        ) from None


@contextmanager
def figure(path: Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.2)) -> Iterator[Any]:
    """The axes of a new figure (an array of them for several), written to ``path`` when the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    yield made.subplots(rows, columns)
    with atomic_file(path) as file:
        made.savefig(file, format="png", dpi=150)


def plot_bench(path: Path, bench: Bench) -> None:
    """Trajectory time against the fraction: measured (median, p10 to p90), predicted, and the baseline if there."""
    runs = sorted(bench.trajectories, key=lambda t: t.fraction)
    x = [t.fraction for t in runs]
    with figure(path) as axes:
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
        axes.grid(alpha=0.3)
        axes.legend()


def plot_calibration(path: Path, calibration: Calibration) -> None:
    """Step cost against the batch, and measured against predicted time of the checks with their errors."""
    with figure(path, columns=2, size=(10.4, 4.2)) as (left, right):
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
            (line,) = left.plot(batches, middle, marker="o", label=label)
            left.fill_between(batches, low, high, alpha=0.2, color=line.get_color())
        left.set_xlabel("images per engine call")
        left.set_ylabel("ms per step")
        left.set_ylim(bottom=0)
        predicted = [check.predicted_ms for check in calibration.checks]
        right.plot(predicted, [100 * check.error for check in calibration.checks], "o")
        right.axhline(0, color="black", linewidth=0.8)
        right.set_xscale("log")
        right.set_xlabel("predicted ms of a random schedule")
        right.set_ylabel("error of the prediction, %")
        right.set_title(
            f"median {100 * calibration.median_error:.1f} %, worst {100 * calibration.worst_error:.1f} %", fontsize=10
        )
        left.set_title(f"{calibration.bundle}: {calibration.backend} on {calibration.device}", fontsize=10)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        left.legend()
