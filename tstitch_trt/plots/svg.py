"""matplotlib's figures as SVG that lies inside a page: its colours follow the page's, its text is text.

matplotlib draws in placeholder colours, which become CSS variables (``--ink``, ``--rule``, ``--series-1``...). Tips
become ``<title>``, which a browser shows and a screen reader says.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, Final
from xml.etree import ElementTree

from markupsafe import Markup

from tstitch_trt.plots.figure import style

__all__ = ["NARROW", "WIDE", "svg"]

WIDE, NARROW = (11.0, 4.4), (5.6, 4.0)  # inches: the width of the page, half of it

_NAMES: Final = (*(f"series-{i}" for i in range(1, 9)), "ink", "muted", "ground", "rule")
_VARIABLES: Final = {f"#0101{i:02x}": name for i, name in enumerate(_NAMES, 1)}
_COLOUR = re.compile("|".join(_VARIABLES))
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FONT = re.compile(r"(font-family:|font: [^;]*?px) [^;]*")


def svg(name: str, title: str, draw: Callable[[Any], None], *, size: tuple[float, float] = WIDE) -> Markup:
    """What ``draw`` draws on the axes that it is given.

    ``name``: unique in the page. ``title``: what the figure shows, in words. ``size``: in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # text is measured in the style's font; the page's own is narrower
    settings = {**style(tuple(_VARIABLES)), "svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's own font shows it
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        _legend(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="none")
    return _inline(file.getvalue(), name, title)


def _legend(figure: Any) -> None:
    """Above the axes, in as many columns as the figure has room for."""
    found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if len(found) > 1:
        handles, labels = zip(*found, strict=True)
        columns = max(1, int(figure.get_figwidth() * 72 / (40 + 5.6 * max(map(len, labels)))))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)


def _inline(text: str, name: str, title: str) -> Markup:
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
    root.set("class", "plot wide" if float(root.get("viewBox", "0 0 0 0").split()[2]) > 500 else "plot")
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
