"""The schedules that a budget chooses from, with the quality that the bundle's studies measured of each.

Sources, the first that has a schedule within the budget decides:

    search       the points that were not dropped, by its metric
    evaluation   the newest with a Fréchet or kernel distance, else LPIPS or PSNR against the large member
    divergence   the schedules that the profile ran, by the error of their final latents; the reference alone has none
    rule         T-Stitch's own (arXiv 2402.14167): the first member first, and as large a share as fits for the last

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
from typing import Final, Literal

from tstitch_engines.bundle.identity import canonical
from tstitch_engines.bundle.manifest import Manifest
from tstitch_trt.plan.options import DEFAULTS, PlanOptions
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.solvers import SolverOptions
from tstitch_trt.study.divergence.orders import counted
from tstitch_trt.study.records import HIGHER_IS_BETTER, Divergence, Evaluation, Search, Study, StudyKind
from tstitch_trt.study.settings import options_of
from tstitch_trt.study.store import differing_weights

__all__ = ["Candidate", "Source", "SourceName", "sources"]

SourceName = StudyKind | Literal["rule"]

METRICS: Final = ("fid", "kid", "lpips", "psnr")  # of an evaluation, the first that it has
_ORDER: Final = ("search", "evaluation", "divergence")
SHARE: Final = "share of the last member"


@dataclass(frozen=True)
class Candidate:
    """``interpolated``: its quality is that between two schedules measured."""

    options: PlanOptions
    plan: Plan
    quality: float
    interpolated: bool = False


@dataclass(frozen=True)
class Source:
    """``made``: when the study was, empty for the rule."""

    name: SourceName
    made: str
    metric: str
    candidates: tuple[Candidate, ...]

    def goodness(self, quality: float) -> float:
        """Larger is better."""
        return quality if self.metric in (*HIGHER_IS_BETTER, SHARE) else -quality


def sources(manifest: Manifest, studies: Iterable[Study], options: PlanOptions) -> tuple[list[Source], tuple[str, ...]]:
    """What ``studies`` (the newest first) and the rule offer for a request with ``options``, the best source first.

    And notes: which studies are of no use, and why. ``options`` name no schedule.
    """
    asked = _asked(manifest, options)
    found: list[Source] = []
    notes: list[str] = []
    for study in sorted(studies, key=lambda study: _ORDER.index(study.kind)):  # stable: the newest stays first
        name = study.kind
        if differing := differing_weights(manifest, study):
            notes.append(
                f"the {name} of {study.made} is of other weights ({', '.join(map(repr, differing))}) and not used"
            )
            continue
        made = _source(manifest, study, asked)
        if made.candidates:
            found.append(made)
        else:
            text = ", ".join(f"{key} {value}" for key, value in asked.items())
            notes.append(f"the {name} of {study.made} has no {made.metric or 'quality'} measured at {text}")
    return [*found, _rule(manifest, options)], tuple(notes)


def _asked(manifest: Manifest, options: PlanOptions) -> Mapping[str, object]:
    """The options that must be as they were measured."""
    said = {name: value for name, value in options.explicit().items() if value != DEFAULTS.get(name)}
    asked = {name: value for name, value in said.items() if name != "start"}
    return {"guidance": manifest.defaults.guidance, **asked}


def _source(manifest: Manifest, study: Study, asked: Mapping[str, object]) -> Source:
    metric, measured = "", list[tuple[PlanOptions, float]]()
    if isinstance(study, Search):
        metric = study.metric
        measured = [(options_of(p.setting), p.quality.value) for p in study.points if not p.dropped]
    elif isinstance(study, Evaluation):
        metric = next((m for m in METRICS if any(m in p.measures for p in study.points)), "")
        measured = [(options_of(p.setting), p.measures[metric].value) for p in study.points if metric in p.measures]
    elif isinstance(study, Divergence):
        metric = "latent_error"
        own = PlanOptions(steps=study.steps, solver=study.solver, guidance=study.guidance)
        measured = [(replace(own, schedule=trial.schedule), trial.latent_error) for trial in study.orders]
        rows = make_plan(manifest, own, schedule=study.reference).steps
        measured.append((replace(own, schedule=f"{study.reference}:{rows}"), 0.0))
    fitting = [(options, value) for options, value in measured if _fits(options, asked)]
    candidates = [Candidate(options, make_plan(manifest, options), quality) for options, quality in fitting]
    return Source(study.kind, study.made, metric, (*candidates, *_between(manifest, candidates)))


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
                    yield Candidate(options, make_plan(manifest, options), quality, interpolated=True)


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
        found.append(Candidate(own, make_plan(manifest, own), (rows - early) / rows))
    return Source("rule", "", SHARE, tuple(found))
