"""How many steps the small member may take before a metric of an evaluation gets worse."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tstitch_trt.study.records import HIGHER_IS_BETTER, Evaluation, Measure, Point
from tstitch_trt.study.settings import share_in_order

__all__ = ["Claim", "claims_of"]


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """The largest ``fraction`` of the steps on the first member at which ``metric`` is within, or better than, the
    interval of the last member alone (``large``). ``speedup``: of the whole trajectory, measured; 0 where not timed."""

    metric: str
    fraction: float
    point: Point
    large: Point
    speedup: float

    @property
    def value(self) -> float:
        return self.point.measures[self.metric].value

    @property
    def bounds(self) -> Measure:
        """The interval of the last member alone."""
        return self.large.measures[self.metric]


def claims_of(evaluation: Evaluation, members: Sequence[str], metric: str = "fid") -> list[Claim]:
    """One claim for each solver, step count and guidance with at least two points in T-Stitch's order.

    ``members``: the bundle's, in its order.
    """
    families: dict[tuple[object, ...], dict[float, Point]] = {}
    for point in evaluation.points:
        share = share_in_order(point.setting, members, "small-first")
        if share is not None and metric in point.measures:
            setting = point.setting
            family = (setting.solver, setting.steps, setting.guidance, msgspec.json.encode(setting.plan))
            families.setdefault(family, {})[share] = point
    return [_claim(metric, points) for points in families.values() if 0.0 in points and len(points) > 1]


def _claim(metric: str, points: dict[float, Point]) -> Claim:
    large = points[0.0]
    bounds = large.measures[metric]

    def within(point: Point) -> bool:
        value = point.measures[metric].value
        return value >= bounds.low if metric in HIGHER_IS_BETTER else value <= bounds.high

    fraction = max(share for share, point in points.items() if within(point))
    found = points[fraction]
    timed = found.ms and large.ms and found.batch == large.batch
    speedup = large.ms / found.ms if timed else 0.0
    return Claim(metric=metric, fraction=fraction, point=found, large=large, speedup=speedup)
