"""How many steps the small member may take before a metric of an evaluation gets worse, and whether that is known."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tstitch_trt.study.noninferiority import Judgement, judge
from tstitch_trt.study.records import METRICS, PAIRED, Evaluation, Point, Setting
from tstitch_trt.study.settings import share_in_order

__all__ = ["Claim", "Trial", "claimed_metric", "claims_of"]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One ``fraction`` of the steps on the first member. ``judgement``: against the last member alone; ``None`` where
    the record keeps no resamples."""

    fraction: float
    schedule: str
    judgement: Judgement | None
    speedup: float

    @property
    def passes(self) -> bool:
        return self.judgement is not None and self.judgement.verdict == "no worse"


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """Fractions of one solver, step count and guidance, tested in their order.

    ``fraction``: the largest up to which all that were measured are no worse than the last member alone in ``metric``;
    ``None`` where there is none, and then nothing is claimed. ``margin``: a share. ``speedup``: of the whole trajectory
    at ``fraction``, measured; 0 where not timed. ``stopped``: the first trial that did not pass; ``None``: all did.
    """

    metric: str
    setting: Setting
    samples: int
    margin: float
    fraction: float | None
    speedup: float
    trials: tuple[Trial, ...]
    stopped: Trial | None

    @staticmethod
    def of(metric: str, setting: Setting, trials: Sequence[Trial], *, samples: int, margin: float) -> Claim:
        """``trials``: by their fraction, the least first. ``setting``: of the last member alone."""
        passed = next((index for index, trial in enumerate(trials) if not trial.passes), len(trials))
        return Claim(
            metric=metric,
            setting=setting,
            samples=samples,
            margin=margin,
            fraction=trials[passed - 1].fraction if passed else None,
            speedup=trials[passed - 1].speedup if passed else 0.0,
            trials=tuple(trials),
            stopped=trials[passed] if passed < len(trials) else None,
        )

    def text(self, first: str, last: str, name: str) -> str:
        """In words. ``name``: of the metric."""
        how = f"{self.setting.solver}, {self.setting.steps} steps, {self.samples:,} samples"
        if self.fraction is None:
            return f"{how}: {self._stop(first, last, name)}"
        trial = next(trial for trial in self.trials if trial.fraction == self.fraction)
        assert trial.judgement is not None
        found = trial.judgement
        faster = f", {self.speedup:.2f} times as fast" if self.speedup else ""
        beyond = "" if self.stopped is None else f"; {self._stop(first, last, name)}"
        return (
            f"{how}: up to {self.fraction:.0%} of the steps on {first} the {name} is no worse than with {last} alone "
            f"({found.difference:+.3g}, at most {found.upper:+.3g}; margin {found.margin:.3g}, {self.margin:.0%})"
            f"{faster}{beyond}"
        )

    def _stop(self, first: str, last: str, name: str) -> str:
        """Why it goes no further."""
        assert self.stopped is not None
        at, found = f"{self.stopped.fraction:.0%} of the steps on {first}", self.stopped.judgement
        if found is None:
            return f"of {at} nothing can be said: the record has no resamples to compare (evaluate again)"
        if found.verdict == "too few samples":
            enough = f"about {found.needed:,} would do" if found.needed else f"many more than {found.samples:,}"
            return f"not enough samples to say if {at} is as good as {last} ({enough})"
        said = f"the {name} {'is' if found.verdict == 'worse' else 'may be'} worse"
        return f"at {at} {said} ({found.difference:+.3g}, at most {found.upper:+.3g}; margin {found.margin:.3g})"


def claimed_metric(evaluation: Evaluation) -> str | None:
    """The metric that claims are made about: the first of ``METRICS`` that was measured and says how good pictures are.

    A metric of ``PAIRED`` only says how much they differ.
    """
    known = {name for point in evaluation.points for name in point.measures}
    return next((name for name in METRICS if name in known and name not in PAIRED), None)


def claims_of(evaluation: Evaluation, members: Sequence[str], metric: str | None = None) -> list[Claim]:
    """One claim for each solver, step count and guidance with the last member alone and another point in T-Stitch's
    order.

    ``members``: the bundle's, in its order. ``metric``: by default ``claimed_metric``.
    """
    name = metric or claimed_metric(evaluation)
    if name is None or name in PAIRED:
        return []
    families: dict[tuple[object, ...], dict[float, Point]] = {}
    for point in evaluation.points:
        share = share_in_order(point.setting, members, "small-first")
        if share is not None and name in point.measures:
            setting = point.setting
            family = (setting.solver, setting.steps, setting.guidance, msgspec.json.encode(setting.plan))
            families.setdefault(family, {})[share] = point
    return [_claim(evaluation, name, points) for points in families.values() if 0.0 in points and len(points) > 1]


def _claim(evaluation: Evaluation, metric: str, points: dict[float, Point]) -> Claim:
    large = points[0.0]
    trials = [_trial(evaluation, metric, share, points[share], large) for share in sorted(points) if share > 0]
    return Claim.of(metric, large.setting, trials, samples=evaluation.samples, margin=evaluation.margin)


def _trial(evaluation: Evaluation, metric: str, share: float, point: Point, large: Point) -> Trial:
    found, alone = point.measures[metric], large.measures[metric]
    timed = point.ms and large.ms and point.batch == large.batch
    return Trial(
        fraction=share,
        schedule=point.setting.schedule,
        judgement=judge(metric, found, alone, samples=evaluation.samples, margin=evaluation.margin),
        speedup=large.ms / point.ms if timed else 0.0,
    )
