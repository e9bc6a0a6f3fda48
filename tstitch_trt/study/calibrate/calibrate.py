"""Measures what trajectories cost on this machine, and how well the cost model predicts others.

Whole trajectories are timed through ``Runtime.sample``. In every round each has a slot, short ones several, in a new
order, those that check the model among those that it is fitted on: a busy machine slows both alike. All times are
without the machine's drift (``tstitch_trt.study.calibrate.drift``).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from tstitch_engines.checks import check_callable, check_whole, checked, items_of, optional, taken_as_is
from tstitch_engines.errors import OutOfProfile
from tstitch_engines.progress import Progress, silent
from tstitch_trt.request.limits import MOST_IMAGES, MOST_SEED, check_sides
from tstitch_trt.study.budget.conditions import engine_digests
from tstitch_trt.study.budget.predict import predict_ms
from tstitch_trt.study.calibrate.drift import usual_times
from tstitch_trt.study.calibrate.fit import Fit, fit
from tstitch_trt.study.calibrate.trials import SHORT, Bucket, Trial, check_trials, fit_trials, kind_trials, slots_of
from tstitch_trt.study.records import Calibration, Check, Overhead, StepCost
from tstitch_trt.study.statistics import spread
from tstitch_trt.study.store import check_command, provenance

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["calibrate", "default_batches"]

UPPER_PERCENTILE: Final = 98


def default_batches(runtime: Runtime) -> tuple[int, ...]:
    """Powers of two, the tuned and the largest batches, with and without guidance, within the engines' limits."""
    split = runtime.splitting
    guidable = runtime.manifest.conditioning.guidable and split.limit >= 2
    sizes = {split.floor, split.limit, *split.tuned, *(1 << i for i in range(31))}
    if guidable:
        sizes |= {split.limit // 2, -(-split.floor // 2), *(tuned // 2 for tuned in split.tuned)}
    least = -(-split.floor // 2) if guidable else split.floor
    return tuple(sorted(size for size in sizes if least <= size <= split.limit))


@checked(
    runtime=taken_as_is,
    batches=optional(items_of(partial(check_whole, low=1, high=MOST_IMAGES))),
    sizes=optional(items_of(check_sides)),
    repeats=partial(check_whole, low=1, high=10_000),
    checks=partial(check_whole, high=10_000),
    seed=partial(check_whole, high=MOST_SEED),
    command=check_command,
    progress=check_callable,
)
def calibrate(
    runtime: Runtime,
    *,
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    repeats: int = 7,
    checks: int = 20,
    seed: int = 0,
    command: str = "",
    progress: Progress = silent,
) -> Calibration:
    """The cost of ``runtime``'s members, and its error on ``checks`` random schedules drawn with ``seed``.

    ``batches``: images per chunk to measure, by default ``default_batches``. ``sizes``: height and width of the latents
    (not of the pictures), by default the bundle's own. ``command``: repeats the measurement.

    Raises ``OutOfProfile`` for a batch or size that the engines do not run.
    """
    buckets = _buckets(runtime, batches, sizes)
    rough = {bucket: kind_trials(runtime, bucket, SHORT) for bucket in buckets}
    for number, (bucket, each) in enumerate(rough.items()):
        progress(f"warming up, {bucket.batch} images", 0.1 * number / len(rough))
        for trial in each:
            trial.times += [trial.run(runtime) for _ in range(2)]
    fitted = {bucket: fit_trials(runtime, bucket, each) for bucket, each in rough.items()}
    checking = check_trials(runtime, buckets, checks, seed=seed)
    rounds = repeats + 1  # the first is not kept
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    trials = [*(trial for each in fitted.values() for trial in each), *checking]
    counts = [1] * len(trials)
    for index in range(rounds):
        slots = [trial for trial, count in zip(trials, counts, strict=True) for _ in range(count)]
        rng.shuffle(slots)
        slots.sort(key=lambda trial: buckets.index(trial.bucket))
        for done, trial in enumerate(slots):
            share = 0.1 + 0.9 * (index + done / len(slots)) / rounds
            progress(f"round {index + 1} of {rounds}: {trial.bucket.batch} images", share)
            trial.run_slot(runtime, keep=index > 0)
        if index == 0:
            counts = slots_of([trial.slot_ms for trial in trials])
    progress("done", 1.0)
    usual = usual_times({trial: trial.slots for trial in trials})
    models = {bucket: fit([(trial.kinds, usual[trial]) for trial in each]) for bucket, each in fitted.items()}
    steps = tuple(cost for bucket, each in fitted.items() for cost in _step_costs(bucket, models[bucket], each))
    overheads = tuple(
        Overhead(batch=b.batch, height=b.size[0], width=b.size[1], ms=model.once, switch_ms=model.switch)
        for b, model in models.items()
    )
    return _checked(
        Calibration(
            **provenance(runtime.manifest, command),
            backend=runtime.backend_name,
            device=runtime.device.name,
            threads=runtime.threads,
            graph=runtime.graphs().mode,
            engines=engine_digests(runtime.bundle, runtime.backend_name, runtime.device.name),
            splitting=runtime.splitting,
            repeats=repeats,
            seed=seed,
            steps=steps,
            overheads=overheads,
            checks=(),
            median_error=0.0,
            worst_error=0.0,
            upper_ratio=1.0,
        ),
        {trial: usual[trial] for trial in checking},
    )


def _buckets(runtime: Runtime, batches: Sequence[int] | None, sizes: Sequence[tuple[int, int]] | None) -> list[Bucket]:
    split = runtime.splitting
    guidable = runtime.manifest.conditioning.guidable
    wanted = default_batches(runtime) if batches is None else tuple(sorted(set(batches)))
    least = -(-split.floor // 2) if guidable else split.floor
    for batch in wanted:
        if not least <= batch <= split.limit:
            raise OutOfProfile(
                f"batch {batch} does not fit one engine call; allowed is {least} to {split.limit}",
                hint=f"e.g. --batch {','.join(map(str, default_batches(runtime)))}; more images run in chunks",
            )
    chosen = [runtime.limits.native_or_largest()] if sizes is None else list(dict.fromkeys(sizes))
    return [Bucket(batch, size, guidable and 2 * batch <= split.limit) for size in chosen for batch in wanted]


def _step_costs(bucket: Bucket, model: Fit, trials: Sequence[Trial]) -> Iterator[StepCost]:
    for (name, guided), ms in model.step.items():
        alone = [trial for trial in trials if trial.alone and trial.kinds[0] == (name, guided)]
        longest = max(alone, key=lambda trial: trial.plan.steps)
        _, low, high = spread((taken - model.once) / longest.plan.steps for taken in longest.times)
        yield StepCost(
            member=name,
            guided=guided,
            batch=bucket.batch,
            height=bucket.size[0],
            width=bucket.size[1],
            ms=ms,
            p10_ms=low,
            p90_ms=high,
            blocks=len(longest.times),
        )


def _checked(calibration: Calibration, usual: Mapping[Trial, float]) -> Calibration:
    """``calibration`` with its checks and their errors. ``usual``: the time of each check, ms."""
    checks, ratios = [], []
    for trial, ms in usual.items():
        bucket = trial.bucket
        predicted = predict_ms(calibration, trial.plan, batch=bucket.batch, size=bucket.size)
        ratios += [taken / predicted for taken in trial.firsts]
        checks.append(
            Check(
                **trial.settings,
                batch=bucket.batch,
                height=bucket.size[0],
                width=bucket.size[1],
                predicted_ms=predicted,
                measured_ms=ms,
                repeats=len(trial.times),
            )
        )
    errors = [abs(check.error) for check in checks]
    return msgspec.structs.replace(
        calibration,
        checks=tuple(checks),
        median_error=statistics.median(errors),
        worst_error=max(errors),
        upper_ratio=float(np.percentile(ratios, UPPER_PERCENTILE)),
    )
