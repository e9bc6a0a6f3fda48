"""What the studies say in one number: how many steps the first member can take before the quality is worse."""

from __future__ import annotations

from dataclasses import dataclass

from tstitch_trt.plots.words import member_share, order_of
from tstitch_trt.study.records import LOWER_IS_BETTER, Evaluation, Point

__all__ = ["Finding", "finding"]


@dataclass(frozen=True)
class Finding:
    """``point``: the largest share of ``first`` whose ``metric`` is no worse than the interval of ``alone``.

    ``speedup``: the time of ``alone`` over the point's, 0 where one of them was not timed on the same batch.
    """

    metric: str
    share: float
    point: Point
    alone: Point
    speedup: float


def finding(evaluation: Evaluation, metric: str, *, first: str, last: str) -> Finding | None:
    """Of the points that share steps, solver and guidance with ``last`` alone at its most steps."""
    points = [point for point in evaluation.points if metric in point.measures]
    alone = max(
        (p for p in points if order_of(p.setting) == (last,)), key=lambda point: point.setting.rows, default=None
    )
    if alone is None:
        return None
    kin = [p for p in points if order_of(p.setting) in ((first, last), (first,)) and _alike(p, alone)]
    good = [p for p in kin if _no_worse(p, alone, metric)]
    if not kin:
        return None
    best = max(good, key=lambda point: member_share(point.setting, first), default=alone)
    timed = bool(alone.ms and best.ms and alone.batch == best.batch)
    return Finding(metric, member_share(best.setting, first), best, alone, alone.ms / best.ms if timed else 0.0)


def _alike(point: Point, other: Point) -> bool:
    mine, theirs = point.setting, other.setting
    return (mine.steps, mine.solver, mine.guidance, mine.plan) == (
        theirs.steps,
        theirs.solver,
        theirs.guidance,
        theirs.plan,
    )


def _no_worse(point: Point, alone: Point, metric: str) -> bool:
    value, base = point.measures[metric].value, alone.measures[metric]
    return value <= base.high if metric in LOWER_IS_BETTER else value >= base.low
