"""Tables of Markdown, and error messages short enough for a cell of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from tstitch_engines.errors import BadInput

__all__ = ["attempt", "code", "codes", "grouped", "outcome", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def code(value: object) -> str:
    return f"`{value}`"


def codes(values: Iterable[object]) -> str:
    return ", ".join(map(code, values))


def attempt(read: Callable[[], object], *, without: Iterable[str] = ()) -> tuple[object, str | None]:
    """What ``read`` gives, and why it was refused. ``without``: names of temporary files, which are left out."""
    try:
        return read(), None
    except BadInput as error:
        message = error.message
    for name in without:
        message = message.replace(f"{name}: ", "").replace(f"checkpoint {name} ", "").replace(f"{name} ", "")
    return None, message


def grouped(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows of one outcome as one row, in the order of the first of each."""
    kinds: dict[str, list[str]] = {}
    for kind, outcome in rows:
        kinds.setdefault(outcome, []).append(kind)
    return [("; ".join(found), outcome) for outcome, found in kinds.items()]


def outcome(good: str, why: str | None, shorter: Mapping[str, str]) -> str:
    """``good``, or the refusal with the first pattern of ``shorter`` that it has put in a shorter form."""
    if why is None:
        return good
    for pattern, short in shorter.items():
        if re.search(pattern, why):
            why = re.sub(pattern, short, why)
            break
    return f"refused: {why}"
