"""The schedules that a budget chooses from, with the quality that the bundle's studies measured of each.

Sources, the first that has a schedule within the budget decides:

    search       the points that were not dropped, by its metric
    evaluation   with a Fréchet or kernel distance, else how far pictures are from the last member's
    divergence   the schedules that the profile ran, by the error of their final latents; the reference alone has none
    rule         T-Stitch's own (arXiv 2402.14167): the first member first, and as large a share as fits for the last

Of several of a kind the one with the most samples comes first, then the newest. A search or an evaluation ranks
schedules by how much worse than the last member alone they are at most (``tstitch_trt.study.noninferiority``), not by
their values, which are better or worse by chance. One whose samples are too few to tell any schedule from it is not
used.

A measured schedule is a candidate where everything that the request fixes (steps, solver, guidance...) is as it was
measured; what the request leaves open is taken from the study.

Between two measured schedules that differ only in where one member hands over to a later one, the schedules with a
switch at the steps between are candidates too, their quality interpolated linearly, so that the whole budget is used.
Nothing is extrapolated beyond the outermost measured ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Final, Literal

from tstitch_engines.bundle.identity import canonical
from tstitch_engines.bundle.manifest import Manifest
from tstitch_trt.plan.options import DEFAULTS, PlanOptions
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.solvers import SolverOptions
from tstitch_trt.study.divergence.orders import counted
from tstitch_trt.study.noninferiority import bounds_of, shortage
from tstitch_trt.study.records import PAIRED, Divergence, Evaluation, Measure, Search, Setting, Study, StudyKind
from tstitch_trt.study.settings import options_of
from tstitch_trt.study.store import differing_weights

__all__ = ["Candidate", "Source", "SourceName", "sources"]

SourceName = StudyKind | Literal["rule"]

METRICS: Final = ("fid", "kid", "lpips", "latent_error", "psnr")  # of an evaluation, the first that it has
_ORDER: Final = ("search", "evaluation", "divergence")
SHARE: Final = "share of the last member"


@dataclass(frozen=True)
class Candidate:
    """``bound``: by which it is chosen, smaller is better. ``interpolated``: both lie between two measured."""

    options: PlanOptions
    plan: Plan
    quality: float
    bound: float
    interpolated: bool = False


@dataclass(frozen=True)
class Source:
    """``made``: when the study was, empty for the rule."""

    name: SourceName
    made: str
    metric: str
    candidates: tuple[Candidate, ...]


def sources(manifest: Manifest, studies: Iterable[Study], options: PlanOptions) -> tuple[list[Source], tuple[str, ...]]:
    """What ``studies`` (the newest first) and the rule offer for a request with ``options``, the best source first.

    And notes: which studies are of no use, and why. ``options`` name no schedule.
    """
    asked = _asked(manifest, options)
    found: list[Source] = []
    notes: list[str] = []
    for study in sorted(studies, key=lambda study: (_ORDER.index(study.kind), -_samples(study))):  # stable
        name = study.kind
        if differing := differing_weights(manifest, study):
            notes.append(
                f"the {name} of {study.made} is of other weights ({', '.join(map(repr, differing))}) and not used"
            )
            continue
        made, reason = _source(manifest, study, asked)
        if made.candidates:
            found.append(made)
        else:
            text = ", ".join(f"{key} {value}" for key, value in asked.items())
            reason = reason or f"has no {made.metric or 'quality'} measured at {text}"
            notes.append(f"the {name} of {study.made} {reason}")
    return [*found, _rule(manifest, options)], tuple(notes)


def _asked(manifest: Manifest, options: PlanOptions) -> Mapping[str, object]:
    """The options that must be as they were measured."""
    said = {name: value for name, value in options.explicit().items() if value != DEFAULTS.get(name)}
    asked = {name: value for name, value in said.items() if name != "start"}
    return {"guidance": manifest.defaults.guidance, **asked}


def _samples(study: Study) -> int:
    return len(study.seeds) if isinstance(study, Divergence) else getattr(study, "samples", 0)


def _source(manifest: Manifest, study: Study, asked: Mapping[str, object]) -> tuple[Source, str]:
    """What a study offers, and why it offers nothing, where that is not the request."""
    metric, reason, candidates = "latent_error", "", list[Candidate]()
    if isinstance(study, Divergence):
        own = PlanOptions(steps=study.steps, solver=study.solver, guidance=study.guidance)
        rows = make_plan(manifest, own, schedule=study.reference).steps
        errors = {f"{study.reference}:{rows}": 0.0, **{trial.schedule: trial.latent_error for trial in study.orders}}
        for schedule, error in errors.items():
            options = replace(own, schedule=schedule)
            if _fits(options, asked):
                candidates.append(Candidate(options, make_plan(manifest, options), error, error))
    elif isinstance(study, Search | Evaluation):
        metric, measured = _measured(study)
        fitting = [pair for pair in measured if _fits(options_of(pair[0]), asked)]
        last = list(manifest.members)[-1]
        reference = _reference(fitting, last) or _reference(measured, last)
        if reference is None and metric in PAIRED:  # psnr has none of the reference, where it is infinite
            reference = max(fitting, key=lambda pair: pair[0].steps, default=None)
        if fitting and reference is None:
            reason = f"has no {metric} of {last!r} alone to compare with, and is not used"
        elif reference is not None:
            others = [measure for setting, measure in fitting if setting != reference[0]]
            short = shortage(metric, others, reference[1], samples=study.samples, margin=study.margin)
            if short is None:
                candidates = _judged(manifest, study, metric, fitting, reference)
            else:
                reason = f"is not used to choose by {metric}: {short}"
    return Source(study.kind, study.made, metric, (*candidates, *_between(manifest, candidates))), reason


Measured = tuple[Setting, Measure]


def _measured(study: Search | Evaluation) -> tuple[str, list[Measured]]:
    """The metric that schedules are chosen by, and who has it on all samples."""
    if isinstance(study, Search):
        return study.metric, [(point.setting, point.quality) for point in study.points if not point.dropped]
    metric = next((m for m in METRICS if any(m in point.measures for point in study.points)), "")
    return metric, [(point.setting, point.measures[metric]) for point in study.points if metric in point.measures]


def _reference(measured: Sequence[Measured], last: str) -> Measured | None:
    """The last member alone in the most steps."""
    alone = [pair for pair in measured if set(pair[0].members) == {last}]
    return max(alone, key=lambda pair: pair[0].steps, default=None)


def _judged(
    manifest: Manifest, study: Study, metric: str, fitting: Sequence[Measured], reference: Measured
) -> list[Candidate]:
    """Candidates with their bounds. An evaluation's paired metrics compare with the reference of each solver, so that
    only one solver's are alike."""
    if metric in PAIRED and isinstance(study, Evaluation):
        same = (reference[0].solver, reference[0].guidance, reference[0].plan)
        fitting = [pair for pair in fitting if (pair[0].solver, pair[0].guidance, pair[0].plan) == same]
    settings, measures = [setting for setting, _ in fitting], [measure for _, measure in fitting]
    bounds = bounds_of(settings, measures, metric, reference[1], list(manifest.members))
    return [
        Candidate(options := options_of(setting), make_plan(manifest, options), measure.value, bound)
        for setting, measure, bound in zip(settings, measures, bounds, strict=True)
        if bound < inf
    ]


def _fits(measured: PlanOptions, asked: Mapping[str, object]) -> bool:
    """Whether what the request says is what was measured."""
    known = {**DEFAULTS, **measured.explicit()}
    for name, value in asked.items():
        if isinstance(value, SolverOptions):
            differing = {key for key, option in value.explicit().items() if known.get(key) != option}
            if value.name != measured.solver or differing:
                return False
        elif known.get(name) != value:
            return False
    return True


def _between(manifest: Manifest, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """The schedules between neighbours of ``candidates`` that differ only in the step of the switch."""
    names = list(manifest.members)
    families: dict[tuple[bytes, int], list[Candidate]] = {}
    for candidate in candidates:
        if len(candidate.plan.schedule.segments) <= 2:
            rest = {key: value for key, value in candidate.options.explicit().items() if key != "schedule"}
            families.setdefault((canonical(rest), candidate.plan.steps), []).append(candidate)
    for (_, rows), family in families.items():
        pairs = {tuple(segment.name for segment in c.plan.schedule.segments) for c in family}
        for first, second in _pairs(names, pairs):
            curve: dict[int, Candidate] = {}
            for candidate in family:
                parts = candidate.plan.schedule.segments
                if [part.name for part in parts] in ([first], [second], [first, second]):
                    curve[parts[0].stop if parts[0].name == first else 0] = candidate
            for (low, before), (high, after) in pairwise(sorted(curve.items(), key=lambda item: item[0])):
                for steps in range(low + 1, high):
                    share = (steps - low) / (high - low)
                    schedule = f"{first}:{steps},{second}:{rows - steps}"
                    options = replace(before.options, schedule=schedule)
                    quality = before.quality + share * (after.quality - before.quality)
                    bound = before.bound + share * (after.bound - before.bound)
                    yield Candidate(options, make_plan(manifest, options), quality, bound, interpolated=True)


def _pairs(names: list[str], found: set[tuple[str, ...]]) -> list[tuple[str, str]]:
    """The members that hand over from an earlier to a later one, and the first and last where both ran alone."""
    pairs = [pair for pair in found if len(pair) == 2 and names.index(pair[0]) < names.index(pair[1])]
    ends = (names[0], names[-1])
    if len(names) > 1 and {ends[:1], ends[1:]} <= found and ends not in pairs:
        pairs.append(ends)
    return sorted((pair[0], pair[1]) for pair in pairs)


def _rule(manifest: Manifest, options: PlanOptions) -> Source:
    first, last = next(iter(manifest.members)), list(manifest.members)[-1]
    rows = make_plan(manifest, options, schedule=last).steps
    found = []
    for early in range(rows + 1 if first != last else 1):
        own = replace(options, schedule=counted([first] * early + [last] * (rows - early)))
        found.append(Candidate(own, make_plan(manifest, own), (rows - early) / rows, early / rows))
    return Source("rule", "", SHARE, tuple(found))
