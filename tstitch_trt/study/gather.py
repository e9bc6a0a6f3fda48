"""The studies of a bundle as a report needs them: those of its weights, and apart from them those of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from tstitch_engines.bundle.bundle import Bundle
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.records import METRICS, Calibration, Divergence, Evaluation, Point, Search, Study
from tstitch_trt.study.store import differing_weights, load_studies

__all__ = ["Studies", "by_metric", "gather"]

S = TypeVar("S", bound=Study)


@dataclass(frozen=True)
class Studies:
    """The newest first; of searches and divergences those with the most samples. ``stale``: of other weights, with the
    members that differ; nothing of them is used."""

    calibrations: tuple[Calibration, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    searches: tuple[Search, ...] = ()
    stale: tuple[tuple[Study, tuple[str, ...]], ...] = ()

    def used(self) -> tuple[Study, ...]:
        """All that are of the bundle's weights."""
        return (*self.calibrations, *self.divergences, *self.evaluations, *self.searches)

    def prompts(self) -> tuple[str, ...]:
        """All texts that were measured with, each once."""
        found = [text for evaluation in self.evaluations for text in evaluation.prompts]
        found += [text for divergence in self.divergences for text in divergence.prompts]
        found += [text for search in self.searches for text in search.prompts]
        return tuple(dict.fromkeys(found))


def gather(bundle: Bundle) -> Studies:
    """All studies in the bundle. Raises ``BadBundle`` for a damaged one."""
    stale: list[tuple[Study, tuple[str, ...]]] = []

    def current(record: type[S]) -> tuple[S, ...]:
        kept = []
        for study in load_studies(bundle, record):
            if differing := differing_weights(bundle.manifest, study):
                stale.append((study, tuple(differing)))
            else:
                kept.append(study)
        return tuple(kept)

    calibrations, divergences = current(Calibration), current(Divergence)
    evaluations, searches = current(Evaluation), current(Search)
    return Studies(
        calibrations,
        tuple(sorted(divergences, key=lambda study: -len(study.seeds))),
        evaluations,
        tuple(sorted(searches, key=lambda study: -study.samples)),
        tuple(stale),
    )


def by_metric(evaluations: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """For each metric that was measured, in the order of ``METRICS``, the evaluation that can tell most about it.

    That is one whose samples are enough to judge a fraction, then the one with the most samples, then with the most
    points, then the newest. Joined to it is what others of the same conditions measured beside it, the newest values
    first. Conditions: number of samples, seed, prompts, features, reference, interval, machine. Values measured under
    others (fewer samples, other features) can't be compared and are not mixed.
    """
    found = {}
    for metric in METRICS:
        with_metric = [e for e in evaluations if any(metric in point.measures for point in e.points)]
        if not with_metric:
            continue
        best = max(with_metric, key=lambda evaluation: _power(evaluation, metric))  # of equal ones the first
        points: dict[tuple[bytes, int], Point] = {}
        for evaluation in with_metric:
            if _conditions(evaluation) == _conditions(best):
                for point in evaluation.points:
                    if metric in point.measures:
                        points.setdefault((msgspec.json.encode(point.setting), point.batch), point)
        found[metric] = msgspec.structs.replace(best, points=tuple(points.values()))
    return found


def _power(evaluation: Evaluation, metric: str) -> tuple[bool, int, int]:
    trials = [trial for claim in claims_of(evaluation, tuple(evaluation.weights), metric) for trial in claim.trials]
    told = any(trial.judgement is not None and trial.judgement.verdict != "too few samples" for trial in trials)
    return told, evaluation.samples, sum(metric in point.measures for point in evaluation.points)


def _conditions(evaluation: Evaluation) -> tuple[object, ...]:
    machine = evaluation.machine
    return (
        evaluation.samples,
        evaluation.seed,
        evaluation.prompts,
        evaluation.features,
        evaluation.reference,
        evaluation.level,
        evaluation.resamples,
        (machine.processor, machine.cores, machine.gpus),
    )
