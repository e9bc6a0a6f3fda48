"""The study of ``tstitch-trt search``: the schedules, step counts and solvers with the best quality for their cost.

The bundle's calibration predicts the cost, samples give the quality.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.checks import (
    check_callable,
    check_number,
    check_path,
    check_text,
    check_type,
    check_whole,
    checked,
    items_of,
    optional,
    taken_as_is,
)
from tstitch_engines.errors import BadInput
from tstitch_engines.progress import Progress, silent
from tstitch_trt.plan.schedule import check_fraction
from tstitch_trt.progress import Phases
from tstitch_trt.request.limits import MOST_IMAGES, MOST_SEED, check_prompt
from tstitch_trt.study.budget import Conditions, find_calibration, predict_ms
from tstitch_trt.study.evaluate.drawing import Drawing
from tstitch_trt.study.image_set import ImageSet, prompts_for
from tstitch_trt.study.noninferiority import bounds_of, check_margin, shortage
from tstitch_trt.study.quality.resampling import Estimate
from tstitch_trt.study.quality.scorer import Scorer, check_metrics
from tstitch_trt.study.records import HIGHER_IS_BETTER, MARGIN, METRICS, Search, SearchPoint
from tstitch_trt.study.search.candidates import FRACTIONS, Candidate, candidates, chosen, usual_steps
from tstitch_trt.study.search.racing import Race, front, race, rounds
from tstitch_trt.study.settings import plan_of
from tstitch_trt.study.store import check_command, provenance

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["LEAST_SAMPLES", "SEARCHED", "check_search", "search", "usual_metric"]

LEAST_SAMPLES: Final = 16
SEARCHED: Final = tuple(name for name in METRICS if name != "psnr")


def usual_metric(manifest: Manifest) -> str:
    """``fid`` where the bundle has a quality network, else ``latent_error``."""
    return "latent_error" if manifest.quality is None else "fid"


def check_search(metric: str | None, samples: int) -> None:
    """Checks what needs no runtime. Raises ``BadInput`` and ``UnknownName``."""
    if metric is not None:
        check_metrics([metric])
        if metric not in SEARCHED:
            raise BadInput(
                f"metric {metric!r} is infinite for the reference, which equals itself; allowed are "
                + ", ".join(SEARCHED),
                hint="compare with the reference by --metric latent_error",
            )
    if samples < LEAST_SAMPLES:
        raise BadInput(
            f"{samples} samples tell no schedule from another; allowed is {LEAST_SAMPLES} or more",
            hint="e.g. --samples 1000",
        )


@checked(
    runtime=taken_as_is,
    scorer=partial(check_type, kind=Scorer),
    work=check_path,
    samples=partial(check_whole, high=MOST_IMAGES),
    seed=partial(check_whole, high=MOST_SEED),
    batch=optional(partial(check_whole, low=1, high=MOST_IMAGES)),
    steps=optional(items_of(check_whole)),
    solvers=optional(items_of(partial(check_text, example="ddim", most=100))),
    fractions=items_of(check_fraction),
    guidance=optional(partial(check_number, low=0)),
    prompts=items_of(check_prompt, MOST_IMAGES),
    trials=optional(check_whole),
    budget_s=optional(check_number),
    margin=check_margin,
    command=check_command,
    progress=check_callable,
)
def search(
    runtime: Runtime,
    scorer: Scorer,
    *,
    work: Path,
    samples: int = 1000,
    seed: int = 0,
    batch: int | None = None,
    steps: Sequence[int] | None = None,
    solvers: Sequence[str] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    guidance: float | None = None,
    prompts: Sequence[str] = (),
    trials: int | None = None,
    budget_s: float | None = None,
    margin: float = MARGIN,
    command: str = "",
    progress: Progress = silent,
) -> Search:
    """The Pareto set of predicted cost and the scorer's metric over all candidates.

    ``work``: where samples are kept; the same search again goes on from there. ``batch``: images of the request whose
    cost is predicted (8, or what fits one engine call). ``steps``, ``solvers``, ``guidance``: by default the bundle's
    (``usual_steps``). ``trials``: the most candidates, drawn by ``seed``. ``budget_s``: seconds after which the current
    round of samples is left out; the first is always finished. ``margin``: how much worse than the reference is no
    worse, a share of its own value.

    Raises ``NotCalibrated`` for a bundle that was not calibrated here, and ``BadInput``.
    """
    began = time.monotonic()
    manifest = runtime.manifest
    check_search(scorer.metric, samples)
    if budget_s is not None and not budget_s > 0:
        raise BadInput(f"a budget of {budget_s / 60:g} minutes; allowed is above 0", hint="e.g. --budget-minutes 30")
    scale = manifest.defaults.guidance if guidance is None else guidance
    every, refused = candidates(
        manifest,
        steps=usual_steps(manifest.defaults.steps) if steps is None else steps,
        solvers=[manifest.defaults.solver] if solvers is None else solvers,
        guidance=scale,
        fractions=fractions,
    )
    field = chosen(every, trials, seed=seed)
    images = ImageSet(samples, seed, prompts_for(manifest, prompts))
    calibration = find_calibration(runtime.bundle, Conditions.here(runtime.setup))
    guided = any(any(plan_of(manifest, c.setting).guided) for c in field)
    batch_images = min(8, runtime.splitting.most(guided=guided)) if batch is None else batch
    costs = {c.key: predict_ms(calibration, plan_of(manifest, c.setting), batch=batch_images) for c in field}
    phases = Phases(progress)
    drawing = Drawing(runtime, scorer, images, reference=field[0].setting, guided=guided, work=work, phases=phases)
    counts = rounds(samples, drawing.chunk)
    by_key = {c.key: c for c in field}

    def estimate(keys: Sequence[str], count: int) -> Mapping[str, Estimate] | None:
        running = [by_key[key] for key in keys]
        before = max((c for c in counts if c < count), default=0)
        phases.phase(f"{count} samples each", before / samples, count / samples, len(running) * count)
        first = count == counts[0]

        def out_of_time() -> bool:
            return not first and budget_s is not None and time.monotonic() - began > budget_s

        if not drawing.fill([c.setting for c in running], count, out_of_time=out_of_time):
            return None
        return {c.key: scorer.estimate(drawing.features(c.setting, count)) for c in running}

    higher = scorer.metric in HIGHER_IS_BETTER
    reference = field[0]
    raced = race(costs, counts, estimate, higher=higher, keep=reference.key)
    points = _points(field, costs, raced, scorer.metric, tuple(manifest.members))
    return Search(
        **provenance(manifest, command),
        metric=scorer.metric,
        batch=batch_images,
        samples=raced.samples,
        seed=seed,
        prompts=images.prompts,
        calibration=digest(calibration),
        margin=margin,
        reference=reference.setting,
        points=points,
        notes=(
            *scorer.notes(raced.samples),
            *_too_few(points, reference, scorer.metric, raced.samples, margin),
            *_told(scorer.metric, reference, len(every) - len(field), refused, raced.samples, samples),
        ),
    )


def _points(
    field: Sequence[Candidate], costs: Mapping[str, float], raced: Race[str], metric: str, members: Sequence[str]
) -> tuple[SearchPoint, ...]:
    """The cheapest first. The front is that of the candidates with all samples, by how much worse than the reference
    they are at most: a value that is good by chance gets nowhere."""
    finished = [c for c in field if not raced.standings[c.key].dropped]
    measures = [raced.standings[c.key].estimate.measure for c in finished]
    bounds = bounds_of([c.setting for c in finished], measures, metric, measures[0], members)
    inside = front([(costs[c.key], bound) for c, bound in zip(finished, bounds, strict=True)])
    best = {c.key for c, is_in in zip(finished, inside, strict=True) if is_in}
    points = [
        SearchPoint(
            kind=c.kind,
            setting=c.setting,
            cost_ms=costs[c.key],
            quality=raced.standings[c.key].estimate.measure,
            samples=raced.standings[c.key].samples,
            dropped=raced.standings[c.key].dropped,
            front=c.key in best,
        )
        for c in field
    ]
    return tuple(sorted(points, key=lambda point: point.cost_ms))


def _too_few(
    points: Sequence[SearchPoint], reference: Candidate, metric: str, samples: int, margin: float
) -> list[str]:
    own = next(point.quality for point in points if point.setting == reference.setting)
    others = [point.quality for point in points if not point.dropped and point.setting != reference.setting]
    reason = shortage(metric, others, own, samples=samples, margin=margin)
    if reason is None:
        return []
    s = reference.setting
    return [f"no schedule can be told from {s.schedule} in {s.steps} {s.solver} steps by {metric}: {reason}"]


def _told(
    metric: str, reference: Candidate, left_out: int, refused: Sequence[str], samples: int, asked: int
) -> list[str]:
    found = []
    if metric in ("latent_error", "lpips"):
        s = reference.setting
        found.append(f"{metric} is the distance from one solution: {s.schedule} in {s.steps} {s.solver} steps")
    if samples < asked:
        found.append(f"time ran out at {samples} of {asked} samples")
    if left_out:
        found.append(f"{left_out} more candidates were left out at random (--trials)")
    return [*found, *(f"not tried: {text}" for text in refused)]
