"""The study of ``tstitch-trt evaluate``: quality and speed of many settings from the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tstitch_engines.bundle.identity import digest
from tstitch_engines.checks import (
    check_callable,
    check_items,
    check_path,
    check_type,
    check_whole,
    checked,
    optional,
    taken_as_is,
)
from tstitch_engines.errors import BadInput
from tstitch_engines.progress import Progress, silent
from tstitch_engines.threads import check_threads
from tstitch_trt.progress import Phases
from tstitch_trt.request.limits import MOST_IMAGES
from tstitch_trt.study.evaluate.drawing import Drawing
from tstitch_trt.study.evaluate.observations import Observations
from tstitch_trt.study.image_set import ImageSet
from tstitch_trt.study.noninferiority import check_margin
from tstitch_trt.study.quality.resampling import LEVEL, RESAMPLES
from tstitch_trt.study.quality.scorer import Scorer
from tstitch_trt.study.records import MARGIN, METRICS, PAIRED, Evaluation, Point, Setting
from tstitch_trt.study.settings import options_of, plan_of, reference_of
from tstitch_trt.study.store import check_command, load_studies, provenance, weights_of

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["evaluate", "evaluation_key", "npz_name"]


def evaluation_key(scorer: Scorer, images: ImageSet, runtime: Runtime, resamples: int) -> str:
    """Identifies an evaluation, whatever settings and metrics it has."""
    network, reference = scorer.network, scorer.reference
    return digest(
        {
            "features": None if network is None else network.identity,
            "reference": None if reference is None else reference.sha256,
            "request": [images.samples, images.seed, list(images.prompts)],
            "backend": [runtime.backend_name, runtime.device.name],
            "resamples": resamples,
        }
    )[:12]


@checked(
    runtime=taken_as_is,
    scorer=partial(check_type, kind=Scorer),
    settings=partial(check_items, each=partial(check_type, kind=Setting)),
    images=partial(check_type, kind=ImageSet),
    work=check_path,
    npz=optional(check_path),
    rounds=partial(check_whole, high=10_000),
    batch=partial(check_whole, low=1, high=MOST_IMAGES),
    resamples=partial(check_whole, low=2, high=100_000),
    margin=check_margin,
    threads=check_threads,
    command=check_command,
    progress=check_callable,
)
def evaluate(
    runtime: Runtime,
    scorer: Scorer,
    settings: Sequence[Setting],
    images: ImageSet,
    *,
    work: Path,
    npz: Path | None = None,
    rounds: int = 0,
    batch: int = 8,
    resamples: int = RESAMPLES,
    margin: float = MARGIN,
    threads: int = 0,
    command: str,
    progress: Progress = silent,
) -> Evaluation:
    """Draws what ``work`` does not hold yet, times ``rounds`` direct runs of ``batch`` pictures, and measures.

    ``npz``: a folder for the pictures of each setting. ``margin``: how much worse is still no worse, a share of the
    last member's own value. Other settings and metrics in the bundle's evaluation of the same key are kept. Raises
    ``BadInput`` for too few samples.
    """
    if images.samples < 2:
        raise BadInput(f"{images.samples} sample; allowed is 2 or more", hint="e.g. --samples 2000")
    manifest = runtime.manifest
    asked = list({digest(setting): setting for setting in settings}.values())
    phases = Phases(progress)
    phases.phase("drawing", 0.0, 1.0, len(asked) * images.samples)
    key = evaluation_key(scorer, images, runtime, resamples)
    earlier = _earlier(runtime, key)
    before = [] if earlier is None else [point.setting for point in earlier.points]
    references = {kind: reference_of(manifest, family) for kind, family in _families([*asked, *before]).items()}
    drawings: dict[str, Drawing] = {}
    for kind, family in _families(asked).items():
        reference = references[kind]
        drawing = Drawing(
            runtime,
            scorer,
            images,
            reference=reference,
            guided=any(any(plan_of(manifest, setting).guided) for setting in (reference, *family)),
            work=work,
            phases=phases,
            keep_images=npz is not None,
        )
        drawing.fill(family, images.samples)
        drawings |= {digest(setting): drawing for setting in family}
    times = _measure_times(runtime, images, drawings, asked, rounds=rounds, batch=batch, phases=phases)
    points, notes = [], list(scorer.notes(images.samples))
    for index, setting in enumerate(asked):
        phases.tick(0, f"measuring {setting.schedule}")
        features = drawings[digest(setting)].features(setting, images.samples)
        if index == 0 and "features" in features:
            notes = list(scorer.notes(images.samples, features))
        name = ""
        if npz is not None:
            from tstitch_trt.images.grid import save_npz

            name = npz_name(setting)
            save_npz(npz / name, features.pop("images"))
        taken = times[digest(setting)]
        points.append(
            Point(
                setting=setting,
                samples=images.samples,
                measures=scorer.measures(features, resamples=resamples),
                batch=batch if taken else 0,
                ms=statistics.median(taken) if taken else 0.0,
                samples_file=name,
            )
        )
    network, real = scorer.network, scorer.reference
    found = Evaluation(
        **provenance(manifest, command),
        backend=runtime.backend_name,
        device=runtime.device.name,
        threads=threads,
        samples=images.samples,
        seed=images.seed,
        prompts=images.prompts,
        metrics=scorer.metrics,
        features={} if network is None or real is None else _origin(network.name, network.sha256, real.width),
        reference={} if real is None else _origin(real.name, real.sha256, real.count),
        level=LEVEL,
        resamples=resamples,
        margin=margin,
        references=tuple(references.values()),
        points=tuple(points),
        notes=tuple(notes),
        key=key,
    )
    return found if earlier is None else _extended(found, earlier)


def _families(settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Settings by solver, guidance and what else is not their schedule or number of steps."""
    found: dict[str, list[Setting]] = {}
    for setting in settings:
        found.setdefault(_family(setting), []).append(setting)
    return found


def _family(setting: Setting) -> str:
    return digest([setting.solver, setting.guidance, setting.plan])


def _earlier(runtime: Runtime, key: str) -> Evaluation | None:
    """The evaluation of these weights that has this key."""
    weights = weights_of(runtime.manifest)
    studies = load_studies(runtime.bundle, Evaluation)
    return next((study for study in studies if (study.key, study.weights) == (key, weights)), None)


def _measure_times(
    runtime: Runtime,
    images: ImageSet,
    drawings: Mapping[str, Drawing],
    settings: Sequence[Setting],
    *,
    rounds: int,
    batch: int,
    phases: Phases,
) -> dict[str, list[float]]:
    """Milliseconds of direct runs by setting: all settings in turn in every round, after one that warms up."""
    stored = {digest(s): Observations(drawings[digest(s)].folder(s) / f"batch-{batch}", {}) for s in settings}

    def run(setting: Setting) -> float:
        keywords = images.keywords(runtime.manifest, 0, batch, setting.members)
        return runtime.sample(decode=False, **keywords, **options_of(setting).explicit()).total_ms

    unfinished = [setting for setting in settings if len(stored[digest(setting)].times()) < rounds]
    if unfinished:
        run(unfinished[0])
    for index in range(rounds):
        for setting in unfinished:
            if len(stored[digest(setting)].times()) <= index:
                phases.tick(0, f"timing, round {index + 1}: {setting.schedule}")
                stored[digest(setting)].add_time(run(setting))
    return {key: place.times() for key, place in stored.items()}


def npz_name(setting: Setting) -> str:
    """The file of a setting's pictures, ``ddim-50-small20-large30-g1.npz``."""
    schedule = setting.schedule.replace(":", "").replace(",", "-").replace("=", "")
    return f"{setting.solver}-{setting.steps}-{schedule}-g{setting.guidance:g}.npz"


def _origin(name: str, sha256: str, count: int) -> dict[str, str | int]:
    return {"name": name, "sha256": sha256, "count": count}


def _extended(found: Evaluation, earlier: Evaluation) -> Evaluation:
    """``found`` with the other settings and metrics of an earlier evaluation.

    Paired metrics of it that compare with another reference, of fewer steps, are left out.
    """
    same = {_family(reference) for reference in found.references if reference in earlier.references}
    known = {}
    for point in earlier.points:
        if _family(point.setting) not in same:
            measures = {name: measure for name, measure in point.measures.items() if name not in PAIRED}
            point = msgspec.structs.replace(point, measures=measures)
        known[digest(point.setting)] = point
    points = []
    for point in found.points:
        before = known.pop(digest(point.setting), None)
        measures = dict(before.measures) | point.measures if before else point.measures
        timed = point if point.ms or before is None else before
        points.append(
            msgspec.structs.replace(
                point,
                measures=measures,
                ms=timed.ms,
                batch=timed.batch,
                samples_file=point.samples_file or (before.samples_file if before else ""),
            )
        )
    points += [point for point in known.values() if point.measures]
    measured = {name for point in points for name in point.measures}
    return msgspec.structs.replace(
        found,
        points=tuple(points),
        metrics=tuple(name for name in METRICS if name in measured),
        notes=found.notes or earlier.notes,
    )
