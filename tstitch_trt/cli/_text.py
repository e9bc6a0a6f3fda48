"""Plain text for stdout: aligned tables, sizes, JSON. No colour and no cropping: it may be read by a program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["counted", "fixed", "print_entries", "print_json", "print_result", "print_table", "size"]

R = TypeVar("R")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns padded to their widest cell; those whose cells all start with a digit or sign are right-aligned."""
    body = [list(row) for row in rows]
    columns = list(zip(header, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(body) and all(c[:1] in "0123456789-+." for c in column[1:] if c) for column in columns]
    lines = [list(header), ["-" * w for w in widths], *body]
    for line in lines:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        click.echo("  ".join(cells).rstrip())


def print_entries(title: str, entries: Iterable[tuple[str, str]]) -> None:
    """A line, and below it one for each word with its text, where there is any."""
    click.echo(title)
    for word, text in entries:
        if text:
            click.echo(f"  {word:<10} {text}")


def counted(count: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def fixed(digits: int, *values: float) -> tuple[str, ...]:
    """Cells of a table: each value with so many digits after the point."""
    return tuple(f"{value:.{digits}f}" for value in values)


def print_json(document: Any) -> None:
    """One JSON document; structs of msgspec become objects. NaN is not JSON and is an error here."""
    import msgspec

    click.echo(json.dumps(msgspec.to_builtins(document), indent=2, allow_nan=False))


def print_result(
    result: R,
    as_json: bool,
    as_text: Callable[[R], None],
    *,
    record: Path | None = None,
    plot: Path | None = None,
    draw: Callable[[Path, R], None] | None = None,
    document: Any = None,
) -> None:
    """A record as JSON, or in words; before that the file ``plot`` is drawn, and ``record``, its own file, named.

    ``document``: what is printed as JSON in place of the record.
    """
    from tstitch_trt.progress import log

    if record is not None:
        log(f"record: {record}")
    if plot is not None and draw is not None:
        draw(plot, result)
        log(f"plot: {plot}")
    if as_json:
        print_json(result if document is None else document)
    else:
        as_text(result)


def size(count: int) -> str:
    """``1536`` -> ``1.5 KiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
