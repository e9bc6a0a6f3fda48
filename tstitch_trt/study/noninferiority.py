"""Is a schedule no worse than the last member alone? A non-inferiority test, paired by seed.

The difference of a metric is that of two settings on samples from the same seeds, positive where the schedule is
worse. It is no worse where the upper 95 % bound of the difference is below a margin. The standard deviation is that of
the difference over bootstrap resamples that draw the same seeds for both (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993); the bound is the normal one. A share of samples (``RATES``) that did not change in any
pair may still differ in 3/N of all (Hanley and Lippman-Hand, JAMA 249, 1983), so its bound is at least that far off.

The margin is a share, ``MARGIN``, of the reference's own value, without the bias of few samples. It is no share of the
distance to the first member alone: a poor small member would widen it. Training one model again from another seed moves
its Fréchet distance with a coefficient of variation of 1 to 2 % (Dufour et al., arXiv 2606.20536), so that 19 of 20
such models are at most 4.7 % (1.645 times the root of 2 times 2 %) worse than another one: 5 % is what a large member
trained again might cost as well.

Several fractions are tested in their order, up to the first that does not pass. That needs no correction for many tests
(fixed-sequence procedure: Westfall and Krishen, J. Stat. Plan. Inference 99, 2001).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import NormalDist
from typing import Final, Literal

import msgspec

from tstitch_engines.checks import check_number
from tstitch_engines.errors import BadInput
from tstitch_trt.study.quality.resampling import LEVEL, unpacked
from tstitch_trt.study.records import HIGHER_IS_BETTER, PAIRED, Measure, Setting

__all__ = ["LEAST_SAMPLES", "RATES", "Judgement", "bounds_of", "check_margin", "judge", "margin_of", "shortage"]

LEAST_SAMPLES: Final = 100  # the bound is a normal approximation
RATES: Final = ("precision", "recall", "accuracy")
_REACH: Final = NormalDist().inv_cdf(LEVEL)
_POWER: Final = NormalDist().inv_cdf(0.8)  # with the samples asked for, equal settings pass in four of five studies

Verdict = Literal["no worse", "worse", "undecided", "too few samples"]


def check_margin(value: object, what: str) -> float:
    """A share above 0, at most 1. Raises ``BadInput``."""
    margin = check_number(value, what, low=0, high=1)
    if margin == 0:
        raise BadInput(f"{what} 0; no number of samples proves a difference of at most 0", hint="e.g. 0.05, for 5 %")
    return margin


@dataclass(frozen=True)
class Judgement:
    """``difference``: positive where the setting is worse. ``upper``: its 95 % bound. ``margin``: in the metric's unit.

    ``verdict``: ``no worse`` (``upper`` is below ``margin``), ``worse`` (the lower bound is above it),
    ``too few samples`` (even a difference of 0 would not have passed), else ``undecided``. ``needed``: samples with
    which equal settings would pass, about; 0 where that is unknown.
    """

    difference: float
    upper: float
    margin: float
    samples: int
    verdict: Verdict
    needed: int


def judge(metric: str, found: Measure, reference: Measure, *, samples: int, margin: float) -> Judgement | None:
    """``found`` against ``reference``, both of ``samples`` samples from the same seeds. ``margin``: a share.

    ``None`` where the records keep no resamples (those of before schema 2), and for metrics that only say how far
    pictures are from the reference's (``PAIRED``).
    """
    if metric in PAIRED or (half := _half_width(found, reference)) is None:
        return None
    worse = found.value - reference.value
    if metric in HIGHER_IS_BETTER:
        worse = -worse
    if metric in RATES:
        half = max(half, 3 / samples)
    most = margin_of(reference, margin)
    needed = 0
    if most > 0:
        needed = max(LEAST_SAMPLES, ceil(samples * (half / most * (1 + _POWER / _REACH)) ** 2))
    verdict: Verdict = "undecided"
    if samples < LEAST_SAMPLES:
        verdict = "too few samples"
    elif worse + half < most:
        verdict = "no worse"
    elif worse - half > most:
        verdict = "worse"
    elif half >= most:
        verdict = "too few samples"
    return Judgement(worse, worse + half, most, samples, verdict, needed)


def _half_width(found: Measure, reference: Measure) -> float | None:
    """How far the bound is from the difference. Of few resamples the standard deviation is uncertain itself: Student's
    quantile, by the first term of its expansion (Abramowitz and Stegun 26.7.5)."""
    a, b = unpacked(found), unpacked(reference)
    if len(a) != len(b) or len(a) < 2:
        return None
    reach = _REACH * (1 + (_REACH**2 + 1) / (4 * (len(a) - 1)))
    return reach * float((a - b).std(ddof=1))


def margin_of(reference: Measure, share: float) -> float:
    """The margin in the metric's unit: a share of the reference's value without the bias of few samples."""
    return share * max(0.0, reference.value - reference.bias)


def shortage(
    metric: str, measures: Iterable[Measure], reference: Measure, *, samples: int, margin: float
) -> str | None:
    """Why none of several settings can be told from the reference; ``None`` where one can, or there is none."""
    found = [judge(metric, measure, reference, samples=samples, margin=margin) for measure in measures]
    few = [one for one in found if one is not None and one.verdict == "too few samples"]
    if metric in PAIRED or not found or any(one is not None and one not in few for one in found):
        return None
    if not few:
        return "it keeps no resamples to compare; measure it again"
    needed = min((one.needed for one in few if one.needed), default=0)
    return f"{samples:,} samples are not enough" + (f"; about {needed:,} would do" if needed else "")


def bounds_of(
    settings: Sequence[Setting], measures: Sequence[Measure], metric: str, reference: Measure, members: Sequence[str]
) -> list[float]:
    """How much worse than ``reference`` each setting is at most (95 %), by which choices are made.

    Infinite where no resamples are kept. A metric of ``PAIRED`` is a distance from the reference already. A schedule
    that hands over from a member to a later one counts as no better than those with fewer steps on the early member and
    all else equal, so that a value that is good by chance is not chosen where a smaller share is worse. The later
    member alone is where that order begins and does not count.
    """
    found = [_bound(metric, measure, reference) for measure in measures]
    curves: dict[bytes, list[tuple[float, int]]] = {}
    for index, setting in enumerate(settings):
        runs = [part.split(":")[0] for part in setting.schedule.split(",")]
        for pair in _pairs(runs, members):
            rest = (pair, setting.solver, setting.steps, setting.guidance, setting.plan)
            curves.setdefault(msgspec.json.encode(rest), []).append((setting.share(pair[0]), index))
    for curve in curves.values():
        worst = -inf
        for _, index in sorted(curve):
            worst = found[index] = max(worst, found[index])
    return found


def _bound(metric: str, found: Measure, reference: Measure) -> float:
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    if metric in PAIRED:
        return sign * found.value + _REACH * found.std
    half = _half_width(found, reference)
    return inf if half is None else sign * (found.value - reference.value) + half


def _pairs(runs: Sequence[str], members: Sequence[str]) -> list[tuple[str, str]]:
    """The pair of members whose curve a schedule is on; one member alone ends its curve with the last."""
    if len(runs) == 1 and runs[0] in members[:-1]:
        return [(runs[0], members[-1])]
    if len(runs) == 2 and all(run in members for run in runs) and members.index(runs[0]) < members.index(runs[1]):
        return [(runs[0], runs[1])]
    return []
