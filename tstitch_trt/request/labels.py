"""Class labels as numbers, ranges and class names, on the command line and in Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tstitch_engines.bundle.manifest import Conditioning
from tstitch_engines.checks import check_text, plain_number, read_items, shown
from tstitch_engines.errors import BadInput, nearest
from tstitch_trt.request.limits import MOST_IMAGES

__all__ = ["RANGE", "expand_range", "parse_labels", "read_labels", "split_list"]

RANGE = re.compile(r"(-?[0-9]{1,20})(?:-(-?[0-9]{1,20}))?")


def parse_labels(text: str, *, classes: int, names: Sequence[str] = ()) -> list[int]:
    """Numbers, ranges and class names, in the order given: ``"3,5,0-9"``, ``"Ankle boot,Bag"``.

    A name may hold a dash ("T-shirt/top") and is compared without regard to case. Raises ``BadInput`` for what is
    neither, and for a number outside ``0..classes-1``.
    """
    by_name: Mapping[str, int] = {name.casefold(): index for index, name in enumerate(names)}
    labels: list[int] = []
    allowed = f"0 to {classes - 1}" + (f" and the names {', '.join(names)}" if 0 < len(names) <= 20 else "")
    example = f"--labels 0-{min(classes, 10) - 1}"
    for part in split_list(text, what="label", example=example):
        if part.casefold() in by_name:
            labels.append(by_name[part.casefold()])
            continue
        match = RANGE.fullmatch(part)
        if match is None:
            close = nearest(part.casefold()[:80], by_name)
            fix = f"did you mean {names[by_name[close]]!r}?" if close else f"write e.g. {example}"
            raise BadInput(f"label {shown(part)} is no number, range or class name; allowed: {allowed}", hint=fix)
        numbers = expand_range(match, text, what="label", example=example, room=MOST_IMAGES - len(labels))
        wrong = next((n for n in numbers if not 0 <= n < classes), None)
        if wrong is not None:
            raise BadInput(f"label {wrong} is out of range; allowed: {allowed}", hint=f"write e.g. {example}")
        labels += numbers
    return labels


def read_labels(value: object, conditioning: Conditioning) -> list[int]:
    """Labels as Python gives them: a number, a class name or text for ``parse_labels``, or a list of these."""
    classes = conditioning.classes
    if isinstance(value, str) or isinstance(plain_number(value), int):
        items = [value]
    else:
        forms = f"is a class number or name, or a list of at most {MOST_IMAGES:,}"
        items = read_items(value, "labels", MOST_IMAGES, allowed=forms, example=f"[0, {classes - 1}]")
    found: list[int] = []
    for label in items:
        number = plain_number(label)
        if isinstance(label, str):
            text = check_text(label, "labels", example="0-4")
            found += parse_labels(text, classes=classes, names=conditioning.names)
        elif isinstance(number, int) and 0 <= number < classes:
            found.append(number)
        else:
            raise BadInput(
                f"label {shown(label)} is out of range; allowed is 0 to {classes - 1}"
                + (", or a class name" if conditioning.names else ""),
                hint=f"e.g. --labels 0-{classes - 1} or labels=[0, {classes - 1}]",
            )
        if len(found) > MOST_IMAGES:
            raise BadInput(f"labels has more than {MOST_IMAGES:,} entries", hint="ask for them in several requests")
    return found


def split_list(text: str, *, what: str, example: str) -> list[str]:
    """The parts between commas, none of them empty. Raises ``BadInput``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise BadInput(f"{what} list {shown(text)} has an empty place", hint=f"write e.g. {example}")
    return parts


def expand_range(match: re.Match[str], text: str, *, what: str, example: str, room: int = MOST_IMAGES) -> list[int]:
    """``"0-9"``, matched by ``RANGE``, as numbers; ``"9-7"`` counts down. ``BadInput`` for more than ``room``."""
    first = int(match[1])
    last = int(match[2]) if match[2] is not None else first
    if abs(last - first) >= room:
        raise BadInput(
            f"with {match[0]!r} the {what} list {shown(text)} has more than {MOST_IMAGES:,} values",
            hint=f"write e.g. {example}",
        )
    return list(range(first, last + 1)) if first <= last else list(range(first, last - 1, -1))
