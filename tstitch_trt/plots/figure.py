"""Figures by matplotlib (the extra ``plot``), drawn without a display, and their one style.

A ``draw_*(axes, record)`` draws one record on axes, for PNG files (``figure``) and pages (``tstitch_trt.plots.svg``)
alike. It takes its colours from the cycle of the style (``series``, ``INK``, ``MUTED``, ``GROUND``), which the two set
to colours of their own, and leaves the legend to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.needs import require
from tstitch_trt.files import atomic_file, require_output

if TYPE_CHECKING:
    from tstitch_trt.study.records import Measure

__all__ = [
    "GROUND", "INK", "MUTED", "Palette", "check_plot", "error_bars", "figure", "point", "require_matplotlib", "series",
    "style", "tip",
]  # fmt: skip

_SERIES: Final = 8
INK, MUTED, GROUND = (f"C{_SERIES + i}" for i in range(3))
_MARKERS: Final = "osD^vPX<"

Palette = tuple[str, ...]
"""Colours of the eight series, of text, lesser text, ground and rules."""

_PAPER: Final[Palette] = (
    "#2563c9", "#c2550a", "#12805c", "#9137a8", "#b3261e", "#0b7285", "#7a5d00", "#5f6b7a",
    "#1b1f27", "#5b6472", "#ffffff", "#dde1e7",
)  # fmt: skip


def series(index: int) -> dict[str, Any]:
    """Colour and marker of a series, the first eight of which differ."""
    return {"color": f"C{index % _SERIES}", "marker": _MARKERS[index % len(_MARKERS)]}


def tip(artist: Any, text: str) -> None:
    """On a page ``text`` is shown when the pointer rests on ``artist``."""
    artist.set_gid(f"tip {text}")


def point(axes: Any, x: float, y: float, text: str, **look: Any) -> None:
    """A marker with a tip. ``look``: of matplotlib's ``plot``."""
    (line,) = axes.plot([x], [y], **{"linestyle": "none", "marker": "o", **look})
    tip(line, text)


def error_bars(axes: Any, x: Sequence[float], measures: Sequence[Measure], **look: Any) -> None:
    """Values with their intervals. ``look``: of matplotlib's ``errorbar``."""
    reach = [[max(m.value - m.low, 0.0) for m in measures], [max(m.high - m.value, 0.0) for m in measures]]
    axes.errorbar(x, [m.value for m in measures], reach, **{"capsize": 2.5, "elinewidth": 1, **look})


def style(colours: Palette) -> dict[Any, Any]:
    """matplotlib's settings."""
    from matplotlib.rcsetup import cycler

    ink, muted, ground, rule = colours[_SERIES:]
    return {
        "axes.prop_cycle": cycler(color=colours),
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.parse_math": False,  # a name with $ in it is no formula
        "axes.edgecolor": rule,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.titlesize": 10,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.9,
        "axes.labelpad": 6,
        "figure.facecolor": "none",
        "savefig.facecolor": ground,
        "grid.color": rule,
        "grid.linewidth": 0.6,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "text.color": ink,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
        "lines.solid_capstyle": "round",
    }


def require_matplotlib() -> None:
    """Raises ``Unavailable`` where plots can't be drawn."""
    require("matplotlib", "drawing plots", extra="plot")


def check_plot(path: Path | None, *, option: str = "--plot") -> None:
    """Raises at once what would otherwise go wrong after minutes of measuring: suffix, folder, matplotlib."""
    if path is None:
        return
    require_output(path, ".png", option=option)
    require_matplotlib()


@contextmanager
def figure(path: Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.2)) -> Iterator[Any]:
    """The axes of a new figure (an array of them for several), written to ``path`` when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style(_PAPER)):
        made = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(made)
        yield made.subplots(rows, columns)
        for axes in made.axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
        with atomic_file(path) as file:
            made.savefig(file, format="png", dpi=150)
