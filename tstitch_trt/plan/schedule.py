"""Which member runs at each step (T-Stitch, arXiv 2402.14167): one text syntax for CLI, Python and JSON.

    small:0.4,large                 fractions of the steps; one segment may leave its share out and takes the rest
    small:0.4,base:0.2,large        several members
    small:20,large:30               step counts
    large:5,small,large:5           counts around a rest
    high@t>=875,low                 boundary in the timestep
    high@sigma>=1.5,low             boundary in sigma (noise over signal)
    base@end=0.8,refiner            base/refiner cut, as diffusers' denoising_end = denoising_start = 0.8
    small,large,large               an explicit list, one name per step
    small:0.4:g=1,large:g=4         guidance per segment

``len(schedule.names) == steps`` and every name is a member, always.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from math import floor
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.checks import FLOAT32_MAX, plain_number, shown
from tstitch_engines.errors import BadSchedule, unknown_name

__all__ = [
    "ROUNDINGS",
    "Schedule",
    "Segment",
    "check_fraction",
    "check_rounding",
    "fraction_text",
    "has_fractions",
    "resolve",
]

_STOPS: Final[Mapping[str, Callable[[float, NDArray[np.float64]], int]]] = {
    "paper": lambda r, time: round(round(r * len(time), 9)),
    "floor": lambda r, time: floor(round(r * len(time), 9)),
    "lcm": lambda r, time: min(floor(round(r * len(time), 9)) + 1, len(time)) if r else 0,
    "timestep": lambda r, time: int(np.count_nonzero(time >= 1 - r)),
    "timestep-strict": lambda r, time: int(np.count_nonzero(time > 1 - r)),
}
ROUNDINGS: Final = tuple(_STOPS)

_FORMS = 'write it as e.g. "small:0.4,large", "small:20,large:30", "high@t>=875,low" or one name per step'
_SEGMENT = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]*)
        (?: :(?P<amount>[0-9.eE+-]+%?)
          | @(?P<what>t|sigma)(?P<op>>=|>)(?P<bound>[0-9.eE+-]+)
          | @end=(?P<end>[0-9.eE+-]+) )?
        (?: :g=(?P<g>[0-9.eE+-]+) )?""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Segment:
    """A run of one member over steps ``start`` (inclusive) to ``stop`` (exclusive)."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Schedule:
    """One member name per step. ``text`` is what was asked for, ``rule`` how it became steps.

    ``guidance[i]`` is the guidance scale the schedule itself gives to step ``i``, ``None`` where it gives none.
    """

    names: tuple[str, ...]
    text: str
    rule: str
    guidance: tuple[float | None, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.names)

    @property
    def counts(self) -> dict[str, int]:
        """Steps by member."""
        return dict(Counter(self.names))

    @property
    def segments(self) -> tuple[Segment, ...]:
        found, start = [], 0
        for name, run in groupby(self.names):
            stop = start + sum(1 for _ in run)
            found.append(Segment(name, start, stop))
            start = stop
        return tuple(found)

    def __str__(self) -> str:
        return " ".join(f"{s.name}[{s.start}:{s.stop}]" for s in self.segments)


@dataclass(frozen=True)
class _Part:
    """One parsed segment of the text. ``kind``: what ``value`` is, empty for a bare name.

    A boundary lies where ``axis`` (``t``, ``sigma`` or ``end``) is at least ``value``, or above it when ``strict``.
    """

    text: str
    name: str
    kind: Literal["", "fractions", "counts", "boundaries"] = ""
    value: float = 0
    axis: str = ""
    strict: bool = False
    g: float | None = None


def check_fraction(value: object, what: str) -> float:
    """A share of the steps. Raises ``BadSchedule``."""
    number = plain_number(value)
    if number is None or not 0 <= number <= 1:
        raise BadSchedule(
            f"{what} {shown(value)} is outside 0..1",
            hint="0 runs the last member alone, 1 the first; e.g. --fraction 0.4",
        )
    return float(number)


def fraction_text(fraction: float, members: Sequence[str]) -> str:
    """T-Stitch's one number as a schedule: the first member for ``fraction`` of the steps, then the last one."""
    if len(members) < 2:
        raise BadSchedule(
            f"a fraction needs two members, the bundle has {list(members)}",
            hint="leave the fraction out, or build a bundle with a small and a large member",
        )
    return f"{members[0]}:{float(fraction)!r},{members[-1]}"


def has_fractions(schedule: str | Sequence[str]) -> bool:
    """Whether some segment is a fraction of the steps. Raises ``BadSchedule`` for a text that can't be read."""
    return isinstance(schedule, str) and any(_parse(p.strip()).kind == "fractions" for p in schedule.split(","))


def check_rounding(rounding: str, schedule: str | Sequence[str], members: Sequence[str]) -> None:
    """Raises ``UnknownName``, and ``BadSchedule`` for a schedule without fractions, on which it has no effect."""
    if rounding not in ROUNDINGS:
        raise unknown_name("rounding", rounding, ROUNDINGS)
    if not has_fractions(schedule):
        text = schedule if isinstance(schedule, str) else ",".join(schedule)
        raise BadSchedule(
            f"rounding {rounding!r} is given, and the schedule {_short(text)!r} has no fractions that it could round",
            hint=f"leave rounding out, or give a fraction: {_short(members[0])}:0.4,{_short(members[-1])}",
        )


def resolve(
    schedule: str | Sequence[str],
    *,
    members: Sequence[str],
    timesteps: NDArray[np.float64],
    sigmas: NDArray[np.float64],
    train_steps: int,
    rounding: str | None = None,
) -> Schedule:
    """The schedule over the steps at ``timesteps`` (float64 ``[N]``, descending) and ``sigmas`` (float64 ``[N]``).

    ``rounding`` turns cumulated fractions r into steps: ``paper`` (the default) round(r N), ``floor`` floor(r N),
    ``lcm`` floor(r N) + 1 (no step for r = 0, at most N), ``timestep`` the steps with t / ``train_steps`` >= 1 - r,
    ``timestep-strict`` those with t / ``train_steps`` > 1 - r. Raises ``BadSchedule``, also for a ``rounding`` beside
    a schedule without fractions, or ``UnknownName``.
    """
    if rounding is not None:
        check_rounding(rounding, schedule, members)
    steps = len(timesteps)
    if isinstance(schedule, str):
        text = schedule
        parts = [_parse(piece.strip()) for piece in schedule.split(",")]
    else:
        text = ",".join(schedule)
        parts = [_Part(name, name) for name in schedule]
    for part in parts:
        if part.name not in members:
            raise unknown_name("member", part.name, members, hint=f"(in the schedule {_short(text)!r})")
    kinds = [part.kind for part in parts]
    if kinds.count("") > 1 or not isinstance(schedule, str):
        return _explicit(parts, text, steps)
    kind = next((kind for kind in ("fractions", "boundaries") if kind in kinds), "counts")
    for part in parts:
        if part.kind not in (kind, ""):
            raise BadSchedule(
                f"the schedule {_short(text)!r} mixes {kind} with {_short(part.text)!r}",
                hint=f"use {kind} for every segment but one",
            )
    if kind == "fractions":
        rounding = rounding or "paper"
        stops = _from_fractions(parts, text, timesteps / train_steps, rounding)
        rule = f"fraction, rounding {rounding}"
    elif kind == "boundaries":
        stops, rule = _from_bounds(parts, text, timesteps, sigmas, train_steps), "boundary"
    else:
        stops, rule = _from_counts(parts, text, steps), "counts"
    names: list[str] = []
    guidance: list[float | None] = []
    for part, stop in zip(parts, stops, strict=True):
        guidance += [part.g] * (stop - len(names))
        names += [part.name] * (stop - len(names))
    assert len(names) == steps
    return Schedule(tuple(names), text, rule, tuple(guidance))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _number(text: str, piece: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadSchedule(
            f"{_short(text)!r} in the schedule segment {_short(piece)!r} is not a number", hint=_FORMS
        ) from None
    if not abs(value) <= FLOAT32_MAX:
        raise BadSchedule(
            f"{_short(text)!r} in the schedule segment {_short(piece)!r} is more than float32 holds", hint=_FORMS
        )
    return value


def _parse(piece: str) -> _Part:
    match = _SEGMENT.fullmatch(piece)
    if match is None:
        raise BadSchedule(f"the schedule segment {_short(piece)!r} can't be read", hint=_FORMS)
    amount, end = match["amount"], match["end"]
    part = _Part(piece, match["name"], g=None if match["g"] is None else _number(match["g"], piece))
    if amount is not None and amount.isdigit() and len(amount) < 10:
        return replace(part, kind="counts", value=int(amount))
    if amount is not None:
        fraction = _number(amount.rstrip("%"), piece) / (100 if amount.endswith("%") else 1)
        if not 0 <= fraction <= 1:
            raise BadSchedule(
                f"fraction {_short(amount)} in the schedule segment {_short(piece)!r} is outside 0..1",
                hint="fractions are shares of the steps (0.4 or 40%); step counts are whole numbers without a dot",
            )
        return replace(part, kind="fractions", value=fraction)
    if match["what"] is not None:
        bound, strict = _number(match["bound"], piece), match["op"] == ">"
        return replace(part, kind="boundaries", value=bound, axis=match["what"], strict=strict)
    if end is not None:
        share = _number(end, piece)
        if not 0 <= share <= 1:
            raise BadSchedule(f"end={share} in {_short(piece)!r} is outside 0..1", hint="e.g. base@end=0.8,refiner")
        return replace(part, kind="boundaries", value=share, axis="end")
    return part


def _explicit(parts: list[_Part], text: str, steps: int) -> Schedule:
    wrong = [p.text for p in parts if p.kind]
    if wrong:
        raise BadSchedule(
            f"the schedule {_short(text)!r} leaves the share of more than one segment out beside {_short(wrong[0])!r}",
            hint="give every segment but one a fraction or a count, or write one bare name per step",
        )
    if len(parts) != steps:
        raise BadSchedule(
            f"the schedule {_short(text)!r} lists {len(parts)} names for {steps} steps",
            hint=f'list {steps} names, or give shares: "{parts[0].name}:0.4,{parts[-1].name}"',
        )
    return Schedule(tuple(p.name for p in parts), text, "list", tuple(p.g for p in parts))


def _from_fractions(parts: list[_Part], text: str, time: NDArray[np.float64], rounding: str) -> list[int]:
    total = sum(p.value for p in parts)
    rest = any(not p.kind for p in parts)
    if total > 1 + 1e-9 or (not rest and total < 1 - 1e-9):
        raise BadSchedule(
            f"the fractions of {_short(text)!r} add up to {total:g}",
            hint="they must add up to 1" + (" at most" if rest else "; leave one out to take the rest"),
        )
    shares = (p.value if p.kind else max(0.0, 1 - total) for p in parts)
    stops = [_STOPS[rounding](round(r, 12), time) for r in accumulate(shares)]  # 0.1 + 0.2 is 0.3
    return [*stops[:-1], len(time)]


def _from_counts(parts: list[_Part], text: str, steps: int) -> list[int]:
    total = sum(int(p.value) for p in parts)
    rest = any(not p.kind for p in parts)
    if total > steps or (not rest and total != steps):
        raise BadSchedule(
            f"the counts of {_short(text)!r} add up to {total} for {steps} steps",
            hint=f"make them add up to {steps}, pass --steps {total}, or leave one count out to take the rest",
        )
    return list(accumulate(int(p.value) if p.kind else steps - total for p in parts))


def _from_bounds(
    parts: list[_Part],
    text: str,
    timesteps: NDArray[np.float64],
    sigmas: NDArray[np.float64],
    train_steps: int,
) -> list[int]:
    if parts[-1].kind:
        raise BadSchedule(
            f"the schedule {_short(text)!r} has no member after its last boundary",
            hint=f'end it with a bare name: "...,{_short(parts[-1].name)}"',
        )
    if not all(p.kind for p in parts[:-1]):
        raise BadSchedule(
            f"{_short(parts[0].text)!r} in {_short(text)!r} has no boundary", hint='e.g. "high@t>=875,low"'
        )
    stops: list[int] = []
    for part in parts[:-1]:
        value = round(train_steps - part.value * train_steps) if part.axis == "end" else part.value
        scale = sigmas if part.axis == "sigma" else timesteps
        stop = int(np.count_nonzero(scale > value if part.strict else scale >= value))
        if stops and stop < stops[-1]:
            raise BadSchedule(
                f"the boundary {_short(part.text)!r} in {_short(text)!r} comes before the one on its left",
                hint="boundaries descend from noise to image: a@t>=800,b@t>=300,c",
            )
        stops.append(stop)
    return [*stops, len(timesteps)]
