"""matplotlib's figures as SVG that lies inside a page: its colours follow the page's, its text is text.

matplotlib draws in placeholder colours, which become CSS variables (``--ink``, ``--rule``, ``--series-1``...). Tips
become ``<title>``, which a browser shows and a screen reader says.

Each plot is drawn twice: for a wide page, and for the width of a phone with larger letters. ``plots/style.css`` shows
one of them.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable
from typing import Any, Final
from xml.etree import ElementTree

from markupsafe import Markup

from tstitch_trt.plots.figure import style

__all__ = ["NARROW", "WIDE", "svg"]

WIDE, NARROW, _PHONE = (11.0, 4.4), (5.6, 4.0), (3.8, 3.6)  # inches: the width of the page, half of it, a phone's
_KINDS: Final = {WIDE: "wide", NARROW: "half"}
_PHONE_FONTS: Final = {"font.size": 11, "legend.fontsize": 10.5}  # 10 CSS pixels or more in a box of 270

_NAMES: Final = (*(f"series-{i}" for i in range(1, 9)), "ink", "muted", "ground", "rule")
_VARIABLES: Final = {f"#0101{i:02x}": name for i, name in enumerate(_NAMES, 1)}
_COLOUR = re.compile("|".join(_VARIABLES))
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FONT = re.compile(r"(font-family:|font: [^;]*?px) [^;]*")


def svg(name: str, title: str, draw: Callable[[Any], None], *, size: tuple[float, float] = WIDE) -> Markup:
    """What ``draw`` draws on the axes that it is given: two ``<svg>``, the second of class ``phone``.

    ``name``: unique in the page. ``title``: what the figure shows, in words. ``size``: of the first, in inches.
    """
    return _drawn(name, title, draw, size) + _drawn(f"{name}-phone", title, draw, _PHONE)


def _drawn(name: str, title: str, draw: Callable[[Any], None], size: tuple[float, float]) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # text is measured in the style's font; the page's own is narrower
    settings = {**style(tuple(_VARIABLES)), "svg.fonttype": "none", "svg.hashsalt": name}
    settings |= _PHONE_FONTS if size == _PHONE else {}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own font shows it
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        if size == _PHONE:
            _wrap(figure)
        _legend(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="none")
    return _inline(file.getvalue(), name, title, f"plot {_KINDS.get(size, 'phone')}")


def _wrap(figure: Any) -> None:
    """The labels of axes in lines that fit beside them."""
    for axes in figure.axes:
        axes.set_xlabel(textwrap.fill(axes.get_xlabel(), 32))
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), 24))


def _legend(figure: Any) -> None:
    """Above the axes, in as many columns as the figure has room for."""
    import matplotlib

    found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if len(found) > 1:
        room, letter = figure.get_figwidth() * 72, 0.62 * matplotlib.rcParams["legend.fontsize"]
        handles = [handle for handle, _ in found]
        labels = [textwrap.fill(label, int((room - 40) / letter)) for _, label in found]
        longest = max(len(line) for label in labels for line in label.splitlines())
        columns = max(1, int(room / (40 + letter * longest)))
        figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(found) // columns) - 1))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)


def _inline(text: str, name: str, title: str, kind: str) -> Markup:
    """matplotlib's document as an element of a page: no XML header, no namespaces, no ids but its own."""
    root = ElementTree.fromstring(_NOT_XML.sub("\ufffd", text))  # noqa: S314 (matplotlib wrote it)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        if (key := attributes.get("id", "")).startswith("tip "):
            del attributes["id"]
            attributes["class"] = "tip"
            said = ElementTree.Element("title")
            said.text = key.removeprefix("tip ")
            element.insert(0, said)
        element.attrib.update({key: _restyled(key, value, name) for key, value in attributes.items()})
    for unwanted in ("width", "height", "version"):
        root.attrib.pop(unwanted, None)
    label = ElementTree.Element("title", {"id": f"{name}-title"})
    label.text = title
    root.insert(0, label)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    root.set("class", kind)
    return Markup(ElementTree.tostring(root, encoding="unicode", method="html"))  # noqa: S704 (the tree escapes texts)


def _restyled(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    if key == "style":
        value = _FONT.sub(r"\1 var(--font)", value)
        return _COLOUR.sub(lambda match: f"var(--{_VARIABLES[match[0]]})", value)
    return value
