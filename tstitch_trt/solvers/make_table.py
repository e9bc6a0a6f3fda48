"""From a solver's name, a noise schedule and a step count to a checked step table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput
from tstitch_trt.solvers.base import Grid, Solver
from tstitch_trt.solvers.noise_schedule import NoiseSchedule, signal_and_noise
from tstitch_trt.solvers.options import SolverOptions, listed_timesteps
from tstitch_trt.solvers.registry import find_solver, resolve
from tstitch_trt.solvers.spacing import check_timesteps, space_sigmas, space_timesteps
from tstitch_trt.solvers.table import StepTable

__all__ = ["make_table"]

Array = NDArray[np.float64]


def make_table(
    solver: str | SolverOptions,
    noise: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Sequence[float] | Array | None = None,
    restarts: Collection[int] = frozenset(),
    **options: object,
) -> StepTable:
    """The step table of ``steps`` steps, or of the given falling ``timesteps``.

    A table has one row for each evaluation of a model. That is one for each step, but ``pndm`` takes its first step
    twice: it has one row more, and restarts and schedules count rows.

    ``options`` are the fields of ``SolverOptions`` and go on top of ``solver``. ``restarts`` are the rows at which a
    multistep solver forgets its earlier estimates and starts again at order 1. Raises ``BadInput`` or ``UnknownName``.
    """
    asked = SolverOptions(name=solver) if isinstance(solver, str) else solver
    if options:
        said = SolverOptions.parse(asked.name, options).explicit()
        asked = replace(asked, **said)  # type: ignore[arg-type]  # explicit() holds checked fields only
    chosen = resolve(asked, own_timesteps=timesteps is not None)
    family = find_solver(chosen.name)
    if chosen.sigmas is not None or not family.from_zero_signal:
        noise = noise.with_signal()
    if timesteps is not None:
        t = check_timesteps(np.asarray(timesteps, np.float64), train_steps=noise.steps)
        if steps is not None and steps != t.size:
            raise BadInput(
                f"{steps} steps but {t.size} timesteps; allowed is one timestep for each step",
                hint="leave steps out when timesteps are given",
            )
        return _table(family, chosen, noise, t, _sigma_at(family, noise, t), restarts)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= noise.steps:
        raise BadInput(
            f"steps is {steps!r}; allowed is a whole number from 1 to {noise.steps}",
            hint=f"ask for 1 to {noise.steps} steps, e.g. --steps {min(50, noise.steps)}",
        )
    t, sigma = _levels(family, chosen, noise, int(steps))
    return _table(family, chosen, noise, t, sigma, restarts)


def _levels(family: Solver, options: SolverOptions, noise: NoiseSchedule, steps: int) -> tuple[Array, Array]:
    """Timesteps and sigmas of each step, float64 ``[N]``."""
    if options.sigmas is not None:
        low, high = float(noise.sigmas[0]), float(noise.sigmas[-1])
        first, last = high, low
        if options.sigma_ends == "spacing":
            first, last = _sigma_at(family, noise, _spaced(family, options, noise, steps))[[0, -1]].tolist()
        sigma_min = last if options.sigma_min is None else options.sigma_min
        sigma_max = first if options.sigma_max is None else options.sigma_max
        for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            if not low <= value <= high:
                raise BadInput(
                    f"{name} is {value:g}; the noise schedule covers {low:g} to {high:g}",
                    hint=f"use a value from {low:g} to {high:g}, or leave {name} out",
                )
        sigma = space_sigmas(options.sigmas, steps, sigma_min=sigma_min, sigma_max=sigma_max)
        t = noise.timestep_of(sigma)
        assert options.sigma_timesteps is not None
        return _rounded(t, sigma, options.sigma_timesteps, noise), sigma
    t = _spaced(family, options, noise, steps)
    return t, _sigma_at(family, noise, t)


def _rounded(t: Array, sigma: Array, rule: str, noise: NoiseSchedule) -> Array:
    """The timesteps that the model is told at the exact ones ``t``."""
    if rule == "exact":
        return t
    if (listed := listed_timesteps(rule)) is None:  # 1e-6: a whole timestep may be a rounding error lower
        return np.rint(t) if rule == "nearest" else np.floor(t + 1e-6)
    told = np.array(listed, np.float64)
    if told.size != t.size or not (_near(told, t) | _around(told, sigma, noise)).all():
        raise BadInput(
            f"sigma_timesteps names {told.size} timesteps; allowed is one for each of the {t.size} steps, within 1 of "
            f"that of its sigma: {', '.join(f'{each:.4g}' for each in t[:8])}{'...' if t.size > 8 else ''}",
            hint="name the timesteps of these sigmas, or use sigma_timesteps='exact'",
        )
    return told


def _near(told: Array, t: Array) -> NDArray[np.bool_]:
    return np.asarray(np.abs(told - t) <= 1)


def _around(told: Array, sigma: Array, noise: NoiseSchedule) -> NDArray[np.bool_]:
    """Whether the noise schedule passes through ``sigma`` within 1 of ``told``: with zero terminal SNR it may pass
    through the level that stands for none of the signal before its last timestep."""
    low, high = (noise.sigma_at(np.clip(told + side, 0, noise.steps - 1)) for side in (-1, 1))
    return np.asarray((low <= sigma) & (sigma <= high))


def _spaced(family: Solver, options: SolverOptions, noise: NoiseSchedule, steps: int) -> Array:
    if family.timesteps is not None:
        return family.timesteps(options, steps, noise.steps)
    assert options.spacing is not None
    last = noise.steps
    if options.lambda_min is not None:
        last = int(np.count_nonzero(-np.log(noise.sigmas) >= options.lambda_min))
        trailing = options.spacing == "trailing"
        need = max(2, steps + (family.extra_point and options.spacing != "dit"))
        if last < noise.steps and (trailing or last < need):
            raise BadInput(
                f"lambda_min is {options.lambda_min:g} (lambda_min_clipped in diffusers), which leaves {last} of "
                f"{noise.steps} timesteps; {steps} steps of spacing {options.spacing!r} need "
                f"{'all of them' if trailing else f'{need} or more'}",
                hint="use a lower lambda_min, or " + ("spacing linspace or leading" if trailing else "fewer steps"),
            )
    return space_timesteps(
        options.spacing,
        steps,
        train_steps=last,
        steps_offset=options.steps_offset or 0,
        extra_point=family.extra_point,
        rounded=not family.continuous,
    )


def _stride_ends(noise: NoiseSchedule, t: Array, end: float) -> Array:
    """The sigma one stride of ``T // N`` below each timestep, ``end`` where that is below timestep 0."""
    below = t - noise.steps // t.size
    return np.where(below < 0, end, noise.sigma_at(np.maximum(below, 0)))


def _sigma_at(family: Solver, noise: NoiseSchedule, t: Array) -> Array:
    return noise.sigma_at(t, interpolation="linear" if family.continuous else "log")


def _table(
    family: Solver, options: SolverOptions, noise: NoiseSchedule, t: Array, sigma: Array, restarts: Collection[int]
) -> StepTable:
    level = np.flatnonzero(sigma[1:] >= sigma[:-1])
    if level.size:
        high, low = t[level[0]], t[level[0] + 1]
        raise BadInput(
            f"the noise does not fall from timestep {high:g} to {low:g}: the last timestep of a noise schedule with "
            f"zero terminal SNR has sigma {sigma[0]:.4g} for solver {family.name!r}",
            hint="take fewer steps, or timesteps farther apart at the noisy end",
        )
    end = {"sigma-min": float(noise.sigmas[0]), "last": float(sigma[-1])}.get(options.final or family.final, 0.0)
    if np.isinf(end):
        raise BadInput(
            f"final='last' ends at timestep {t[-1]:g}, where there is no signal: nothing would be drawn",
            hint="use final='zero', or more steps",
        )
    if end > sigma[-1]:
        raise BadInput(
            f"final='sigma-min' ends at sigma {end:g}, above that of the last step, {sigma[-1]:g}",
            hint="use final='zero', or a last step that is at least as noisy as timestep 0",
        )
    ends = None if options.step_to != "stride" else signal_and_noise(_stride_ends(noise, t, end))
    stride = noise.steps // t.size
    if family.evaluations is not None:
        t, sigma = family.evaluations(t), family.evaluations(sigma)
        ends = None if ends is None else (family.evaluations(ends[0]), family.evaluations(ends[1]))
        if t.size > noise.steps:  # the arena has room for that many rows
            raise BadInput(
                f"{family.name!r} evaluates {t.size} times; allowed is {noise.steps}, the length of the schedule",
                hint=f"ask for at most {noise.steps - 1} steps",
            )
    sigmas = np.append(sigma, end)
    a, s = signal_and_noise(sigmas)
    c_in = np.ones(t.size)
    if family.space == "ve":
        a, s, c_in = np.ones_like(sigmas), sigmas, a[:-1]
    via = None if family.via is None else signal_and_noise(_sigma_at(family, noise, family.via(options, t, stride)))
    grid = Grid(t=t, a=a, s=s, age=_ages(t.size, restarts), ends=ends, via=via)
    made = family.coefficients(grid, options)
    return StepTable(
        solver=options,
        t=t,
        c_in=c_in,
        **vars(made),
        a=grid.a[:-1],
        s=grid.s[:-1],
        a_end=float(grid.a[-1]),
        s_end=float(grid.s[-1]),
        init_scale=_init_scale(family, options, sigma[0]),
        ends=ends if made.keeps_mean else None,  # PNDM's are for its coefficients
    )


def _init_scale(family: Solver, options: SolverOptions, sigma: float) -> float:
    """diffusers' init_noise_sigma: ``leading`` starts below the noisiest timestep, where there is some signal too."""
    if family.space == "vp":
        return 1.0
    return float(np.hypot(1.0, sigma)) if options.spacing == "leading" else float(sigma)


def _ages(steps: int, restarts: Collection[int]) -> NDArray[np.int64]:
    for step in restarts:
        if not 0 <= step < steps:
            raise BadInput(
                f"restart at step {step}; allowed is 0 to {steps - 1}",
                hint="name steps of the trajectory, counted from 0",
            )
    index = np.arange(steps)
    starts = np.where(np.isin(index, [0, *restarts]), index, 0)
    return np.asarray(index - np.maximum.accumulate(starts), np.int64)
