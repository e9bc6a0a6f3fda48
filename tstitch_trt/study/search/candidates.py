"""The candidates of a search: schedules of several families, step counts and solvers.

fewer steps          the last member alone, in every number of steps, which a stitched schedule has to beat
one member           another member alone
two members          a share of the steps on one member, the others on a later (larger) one
three members        shares on two members, the others on a third
large-small-large    a share in the middle of the last member's steps on the first
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np

from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, BadSchedule
from tstitch_trt.study.divergence.orders import counted, order_names, small_counts
from tstitch_trt.study.records import Setting
from tstitch_trt.study.settings import setting_of

__all__ = ["FRACTIONS", "Candidate", "candidates", "chosen", "usual_steps"]

FRACTIONS: Final = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, eq=False)
class Candidate:
    kind: str
    setting: Setting

    @property
    def key(self) -> str:
        return digest(self.setting)


def usual_steps(steps: int) -> tuple[int, ...]:
    """The bundle's own number of steps, two fifths and a fifth of it: 10, 20, 50."""
    return tuple(sorted({max(1, round(steps * share)) for share in (0.2, 0.4, 1.0)}))


def candidates(
    manifest: Manifest,
    *,
    steps: Sequence[int],
    solvers: Sequence[str],
    guidance: float,
    fractions: Sequence[float] = FRACTIONS,
) -> tuple[list[Candidate], list[str]]:
    """Every candidate once, and the schedules that the plan refuses.

    The first is the reference: the last member alone in the most steps, by the first solver.

    Raises ``BadInput`` for a bundle of one member, step counts and fractions out of range.
    """
    names = tuple(manifest.members)
    if len(names) < 2:
        raise BadInput(
            f"the bundle {manifest.name!r} has one member, {names[0]!r}: there is no schedule to choose",
            hint="build a bundle of a small and a large member",
        )
    for count in steps:
        if count < 1:
            raise BadInput(f"{count} steps; allowed are whole numbers from 1 on", hint="e.g. --steps 10,20,50")
    if not steps or not solvers:
        raise BadInput("no step count or no solver to search over", hint="e.g. --steps 10,20,50 --solvers ddim")
    found: dict[str, Candidate] = {}
    refused: list[str] = []
    most = sorted(set(steps), reverse=True)
    for solver in dict.fromkeys(solvers):
        for count in most:
            rows = setting_of(manifest, schedule=names[-1], steps=count, solver=solver, guidance=guidance).rows
            for kind, members in _families(names, rows, fractions):
                text = counted(members)
                try:
                    setting = setting_of(manifest, schedule=text, steps=count, solver=solver, guidance=guidance)
                except BadSchedule as error:  # a member that can't begin without signal
                    refused.append(f"{solver} {count}: {text}: {error.message}")
                    continue
                candidate = Candidate(kind, setting)
                found.setdefault(candidate.key, candidate)
    return list(found.values()), refused


def _families(names: Sequence[str], rows: int, fractions: Sequence[float]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Kind and one member name per row."""
    yield "fewer steps", (names[-1],) * rows
    for name in names[:-1]:
        yield "one member", (name,) * rows
    counts = small_counts(fractions, rows)
    for first, second in combinations(names, 2):
        for count in counts:
            yield "two members", order_names("small-first", count, rows, small=first, large=second)
    for first, second, third in combinations(names, 3):
        for one in counts:
            for two in counts:
                if one + two < rows:
                    yield "three members", (first,) * one + (second,) * two + (third,) * (rows - one - two)
    for count in counts:
        if rows - count > 1:  # with one step left it would be large first
            order = "large-small-large"
            yield order, order_names(order, count, rows, small=names[0], large=names[-1])


def chosen(every: Sequence[Candidate], trials: int | None, *, seed: int) -> list[Candidate]:
    """At most ``trials`` of them, drawn by ``seed``, in their order. The first, the reference, is always among them.

    Raises ``BadInput`` for fewer than 2.
    """
    if trials is None:
        return list(every)
    if trials < 2:
        raise BadInput(
            f"{trials} candidates to search among; allowed is 2 or more", hint="e.g. --trials 20, or leave it out"
        )
    drawn = np.random.default_rng(seed).permutation(len(every) - 1)[: trials - 1] + 1
    return [every[i] for i in (0, *sorted(int(i) for i in drawn))]
