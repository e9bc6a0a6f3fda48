"""Plots of measurements, by matplotlib (the extra ``plot``), drawn without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.files import atomic_file, require_parent

if TYPE_CHECKING:
    from tstitch_trt.bench import Bench

__all__ = ["check_plot", "figure", "plot_bench"]


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
