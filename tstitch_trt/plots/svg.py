"""matplotlib's figures as SVG that lies inside a page: its colours follow the page's, its text is text.

matplotlib draws in placeholder colours, which become CSS variables (``--ink``, ``--rule``, ``--series-1``...): one
drawing serves light, dark and print. Points may carry a tip, which is the ``<title>`` that a browser shows and a
screen reader says.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from xml.etree import ElementTree

from tstitch_engines.errors import Unavailable
from tstitch_trt.plots.markup import Markup

__all__ = ["GROUND", "INK", "MUTED", "RULE", "Drawing", "drawing", "require_matplotlib", "series_colour"]

INK, MUTED, RULE, GROUND = "#010101", "#010102", "#010103", "#010104"
_SERIES: Final = tuple(f"#01020{i}" for i in range(1, 9))
_VARIABLES: Final = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    GROUND: "--ground",
    **{colour: f"--series-{i}" for i, colour in enumerate(_SERIES, 1)},
}
_COLOUR = re.compile("|".join(_VARIABLES))
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"(font-family:|font: [^;]*?px) [^;]*")
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # what text is measured with; the page's own font is narrower
    "font.size": 9.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.9,
    "axes.labelpad": 6,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "lines.solid_capstyle": "round",
}


def require_matplotlib() -> None:
    """Raises ``Unavailable`` where plots can't be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Unavailable(
            "the plots of a report need matplotlib, which is not installed",
            hint='run: pip install "tstitch-trt[plot]"',
        ) from None


def series_colour(index: int) -> str:
    """A colour of its own for each of the first eight series."""
    return _SERIES[index % len(_SERIES)]


class Drawing:
    """Axes to draw on, and after the block ``markup``."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.markup = Markup("")
        self.tips: dict[str, str] = {}

    def tip(self, artist: Any, text: str) -> None:
        """``text`` is shown when the pointer rests on ``artist``."""
        key = f"tip-{len(self.tips)}"
        artist.set_gid(key)
        self.tips[key] = text

    def point(self, x: float, y: float, text: str, **style: Any) -> None:
        """A marker with a tip. ``style``: of matplotlib's ``plot``."""
        (line,) = self.axes.plot([x], [y], **{"linestyle": "none", "marker": "o", **style})
        self.tip(line, text)


@contextmanager
def drawing(name: str, title: str, *, size: tuple[float, float]) -> Iterator[Drawing]:
    """One figure. ``name``: unique in the page, ``title``: what it shows, in words. ``size`` in inches."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        made = Drawing(figure.subplots())
        yield made
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    made.markup = _inline(file.getvalue(), name, title, made.tips)


def _inline(text: str, name: str, title: str, tips: dict[str, str]) -> Markup:
    """matplotlib's document as an element of a page: no XML header, no namespaces, no ids but its own."""
    root = ElementTree.fromstring(text)  # noqa: S314 (matplotlib wrote it)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {}
        for key, value in element.attrib.items():
            bare = key.rpartition("}")[2]
            attributes[bare] = _restyled(bare, value, name)
        element.attrib.clear()
        element.attrib.update(attributes)
        key = attributes.get("id", "").removeprefix(f"{name}-")
        if key in tips:
            said = ElementTree.Element("title")
            said.text = tips[key]
            element.insert(0, said)
            element.set("class", "tip")
    for unwanted in ("width", "height", "version"):
        root.attrib.pop(unwanted, None)
    label = ElementTree.Element("title", {"id": f"{name}-title"})
    label.text = title
    root.insert(0, label)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    root.set("class", "plot wide" if float(root.get("viewBox", "0 0 0 0").split()[2]) > 500 else "plot")
    return Markup(ElementTree.tostring(root, encoding="unicode", method="html"))


def _restyled(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    if key == "style":
        value = _FONT.sub(r"\1 var(--font)", value)
        return _COLOUR.sub(lambda match: f"var({_VARIABLES[match[0]]})", value)
    return value
