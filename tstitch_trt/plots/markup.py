"""HTML that is escaped by construction: text becomes markup only through ``tag``."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["Markup", "command", "facts", "join", "paragraph", "table", "tag"]

_VOID: Final = ("img", "meta")
_NUMBER: Final = re.compile(r"–|[-+.×]?\d[\d.,e+-]*(%|×\d+)?( \[.*\])?")


class Markup(str):
    """A piece of HTML. A plain ``str`` beside it is text, and is escaped."""

    __slots__ = ()


Child = str | Markup | None


def join(children: Iterable[Child]) -> Markup:
    """The pieces one after another; ``None`` is left out."""
    parts = (c if isinstance(c, Markup) else html.escape(c) for c in children if c is not None)
    return Markup("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Markup:
    """An element. ``class_`` is the attribute ``class``, ``aria_label`` is ``aria-label``; ``None`` leaves one out."""
    said = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        said.append(f" {word}" if value is True else f' {word}="{html.escape(str(value))}"')
    opening = f"<{name}{''.join(said)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def paragraph(*children: Child, class_: str | None = None) -> Markup:
    return tag("p", *children, class_=class_)


def command(text: str) -> Markup:
    """A command line, on a line of its own and easy to select."""
    return tag("pre", tag("code", text), class_="command")


def table(header: Sequence[Child], rows: Sequence[Sequence[Child]], *, caption: Child = None) -> Markup:
    """A table that scrolls on its own where it is too wide; columns of numbers are set to the right."""
    numbers = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(header))]
    kinds = ["number" if number else None for number in numbers]
    head = tag("tr", *(tag("th", cell, scope="col", class_=kind) for cell, kind in zip(header, kinds, strict=True)))
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    said = tag("caption", caption) if caption else None
    inner = tag("table", said, tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=_plain(caption) or "table")


def facts(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """Names with their values, those without one left out."""
    return tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in pairs if value))


def _plain(text: Child) -> str:
    return "" if text is None or isinstance(text, Markup) else text


def _numeric(cell: Child) -> bool:
    return not cell or (not isinstance(cell, Markup) and _NUMBER.fullmatch(cell) is not None)
