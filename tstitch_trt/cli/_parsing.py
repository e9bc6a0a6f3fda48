"""The small text forms of the command line and the API: labels, seeds, fractions, intervals, NAME=VALUE pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput
from tstitch_trt.request.labels import RANGE, expand_range, split_list
from tstitch_trt.request.limits import MOST_IMAGES

__all__ = [
    "parse_age",
    "parse_fractions",
    "parse_interval",
    "parse_numbers",
    "parse_pairs",
    "parse_pixels",
    "parse_size",
]

_AMOUNT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)")
_SHARE = re.compile(r"[+-]?[0-9]{0,20}\.?[0-9]{0,20}(?:[eE][+-]?[0-9]{1,2})?|[0-9]{1,9}/[0-9]{1,9}")
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SECONDS = {"min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_numbers(text: str, *, what: str, example: str) -> list[int]:
    """``"3,5,0-9"`` -> ``[3, 5, 0, 1, ... 9]``; ``"9-7"`` counts down. Raises ``BadInput``."""
    numbers: list[int] = []
    for part in split_list(text, what=what, example=example):
        match = RANGE.fullmatch(part)
        if match is None:
            raise _wrong(f"{what} {shown(part)} in {shown(text)} is neither a whole number nor a range A-B", example)
        numbers += expand_range(match, text, what=what, example=example, room=MOST_IMAGES - len(numbers))
    return numbers


def parse_fractions(text: str) -> tuple[float, ...]:
    """``"0:1:0.1"`` (start, stop inclusive, step) or ``"0,0.4,1"``, each in 0..1. Raises ``BadInput``."""
    example = "--fractions 0:1:0.1 or --fractions 0,0.4,1"
    if ":" in text:
        parts = text.split(":")
        if len(parts) != 3:
            raise _wrong(f"fractions {shown(text)} are not START:STOP:STEP", example)
        start, stop, step = (_fraction(p, text, example) for p in parts)  # exact: 0.1 ten times is 1
        if step <= 0 or stop < start or (stop - start) / step > 1000:
            allowed = "START <= STOP and a STEP above 0 that gives at most 1,000 points"
            raise _wrong(f"fractions {shown(text)}: allowed is {allowed}", example)
        values = [start + i * step for i in range(int((stop - start) / step) + 1)]
    else:
        values = [_fraction(p, text, example) for p in split_list(text, what="fraction", example=example)]
    if len(set(values)) != len(values):
        raise BadInput(f"fractions {shown(text)} name a value twice", hint="name each fraction once")
    return tuple(float(v) for v in values)


def parse_interval(text: str) -> tuple[int, int]:
    """``"10:40"`` -> ``(10, 40)``: steps 10 to 39. Raises ``BadInput``."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        problem = f"interval {shown(text)} is not FIRST:STOP with whole numbers and FIRST < STOP"
        raise _wrong(problem, "--guidance-interval 10:40 to guide steps 10 to 39")
    return int(match[1]), int(match[2])


def parse_pixels(text: str) -> tuple[int, int]:
    """``"768x512"`` -> ``(768, 512)``, width and height in pixels. Raises ``BadInput``."""
    match = re.fullmatch(r"([0-9]{1,9})[xX×]([0-9]{1,9})", text.strip())
    if match is None or not int(match[1]) or not int(match[2]):
        raise _wrong(
            f"size {shown(text)} is not WIDTHxHEIGHT in whole pixels", "--size 768x512 for 768 across, 512 down"
        )
    return int(match[1]), int(match[2])


def parse_pairs(texts: Sequence[str], *, option: str, value: str) -> dict[str, str]:
    """``["small=S.pt", "large=XL.pt"]`` -> a dict. Raises ``BadInput`` for a missing ``=`` or a name given twice."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not (equals and name and rest):
            raise _wrong(f"{option} {shown(text)} is not NAME={value}", f"{option} small={value}")
        if name in pairs:
            raise BadInput(
                f"{option} names {shown(name)} twice: {shown(pairs[name])} and {shown(rest)}",
                hint="give each name once",
            )
        pairs[name] = rest
    return pairs


def _fraction(part: str, text: str, example: str) -> Fraction:
    try:  # Fraction makes all 10**9 digits of 1e1000000000
        value = Fraction(part.strip() if _SHARE.fullmatch(part.strip()) else "")
    except (ValueError, ZeroDivisionError):
        raise _wrong(f"fraction {shown(part)} in {shown(text)} is not a number", example) from None
    if not 0 <= value <= 1:
        raise _wrong(f"fraction {shown(part)} in {shown(text)} is outside 0 to 1", example)
    return value


def parse_size(text: str, *, option: str) -> int:
    """``"20GB"`` -> 20,000,000,000 bytes; ``GiB`` is 2^30. Raises ``BadInput``."""
    return int(_amount(text, _BYTES, what="a size in B, kB, MB, GB, TB, KiB, MiB or GiB", example=f"{option} 20GB"))


def parse_age(text: str, *, option: str) -> float:
    """``"30d"`` -> seconds; also ``min``, ``h`` and ``w``. Raises ``BadInput``."""
    return _amount(text, _SECONDS, what="an age in min, h, d or w", example=f"{option} 30d")


def _amount(text: str, units: Mapping[str, int], *, what: str, example: str) -> float:
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        raise _wrong(f"{shown(text)} is not {what}", example)
    return float(match[1]) * units[match[2].lower()]


def _wrong(problem: str, example: str) -> BadInput:
    return BadInput(problem, hint=f"write e.g. {example}")
