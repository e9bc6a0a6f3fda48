"""The HTML templates of pages (jinja2, autoescape on): a text becomes markup only in a template's own words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

from tstitch_trt.plots.words import METRIC_NAMES, better, date, interval, machine_text, ms

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["environment", "fill", "stylesheet"]

_NUMBER: Final = re.compile(r"–|[-+.×]?\d[\d.,e+-]*(%|×\d+)?( \[.*\])?")


@cache
def environment() -> Environment:
    """Templates by their path in this package, with the words of ``tstitch_trt.plots.words`` as filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("tstitch_trt", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "better": better,
        "date": date,
        "interval": interval,
        "machine": machine_text,
        "metric": lambda name: METRIC_NAMES.get(name, name),
        "ms": ms,
        "percent": lambda value, digits=0: f"{value:.{digits}%}",
        "g": lambda value: f"{value:g}",
        "digits": lambda value, digits=3: f"{value:.{digits}g}",
        "number": lambda value: f"{value:,}",
    }
    made.globals["number_columns"] = _number_columns
    return made


def fill(template: str, **values: Any) -> Markup:
    """The template filled in. Raises ``jinja2.UndefinedError`` for a name that it was not given."""
    return Markup(environment().get_template(template).render(values))  # noqa: S704 (the template escapes texts)


def stylesheet(package: str) -> Markup:
    """The CSS of plots and tables, and that of ``package``."""
    found = (files(name).joinpath("style.css").read_text(encoding="utf-8") for name in ("tstitch_trt.plots", package))
    return Markup("\n".join(found))  # noqa: S704 (our own files)


def _number_columns(width: int, rows: Sequence[Sequence[str]]) -> list[bool]:
    """The columns of a table that hold numbers alone."""
    return [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(width)]


def _numeric(cell: str) -> bool:
    return not cell or (not isinstance(cell, Markup) and _NUMBER.fullmatch(cell) is not None)
