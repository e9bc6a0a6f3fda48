"""How the scheduler of a diffusers pipeline steps, as the options of a plan: step by step what its code does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.scheduler_config import Scheduler, read_scheduler
from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.own_code import scheduler_class
from tstitch_trt.plan.options import StepKeywords
from tstitch_trt.plan.plan import Plan
from tstitch_trt.solvers import SPACING_OPTIONS, SolverOptions
from tstitch_trt.solvers.registry import find_solver, resolve

__all__ = ["AskedSteps", "check_plan", "more_noise", "plan_keywords", "read_own"]

Array = NDArray[np.float64]

_CLOSE, _ROUNDING = 1e-2, 1e-6  # relative and absolute; diffusers multiplies a thousand alphas in float32
_APART = 0.5  # whole timesteps that are not the same; those of sigmas may be a little off in float32


@dataclass(frozen=True, kw_only=True)
class AskedSteps:
    """The arguments of a pipeline's call that its scheduler is given; ``None``: not said."""

    steps: int | None = None
    timesteps: Sequence[float] | None = None
    original_inference_steps: int | None = None
    eta: float = 0.0


def read_own(scheduler: Any) -> Scheduler:
    """The configuration of a diffusers scheduler. Raises ``BadInput`` naming what can't be honoured."""
    config = {**scheduler.config, "_class_name": scheduler_class(scheduler)}
    return read_scheduler(config, where="the pipeline's scheduler")


def _set_up(scheduler: Any, asked: AskedSteps) -> Any:
    """A copy of ``scheduler`` whose own code has placed the steps. Raises ``BadInput`` for what it does not take."""
    found, name = copy.copy(scheduler), type(scheduler).__name__
    given: dict[str, Any] = {"num_inference_steps": asked.steps}
    if asked.timesteps is not None:
        given = {"timesteps": list(asked.timesteps)}
    if asked.original_inference_steps is not None:
        given["original_inference_steps"] = asked.original_inference_steps
    taken = inspect.signature(type(found).set_timesteps).parameters
    for key in given:
        if key not in taken:
            raise BadInput(f"{key} was given, and {name} takes none", hint="leave it out, or set another scheduler")
    try:
        found.set_timesteps(**given)
    except Exception as error:  # of foreign code, about foreign values
        values = ", ".join(f"{key} {value}"[:200] for key, value in given.items())
        raise BadInput(
            f"{name} can't place its steps by {values}: {str(error)[:500]}",
            hint="ask for other steps, or set another scheduler",
        ) from None
    return found


def plan_keywords(scheduler: Any, asked: AskedSteps) -> StepKeywords:
    """What a plan is told so that it steps as ``scheduler`` does. The solver's options are complete: a bundle's own
    defaults have no part in it. Raises ``BadInput`` naming what can't be honoured.
    """
    read = read_own(scheduler)
    _check_asked(scheduler, read, asked)
    set_up = _set_up(scheduler, asked)
    options = {**read.options, **read.as_written}
    if read.places:
        options["spacing"] = read.spacing
    if asked.original_inference_steps is not None:
        options["original_steps"] = asked.original_inference_steps
    if asked.eta:
        options["eta"] = float(asked.eta)
    given = None if asked.timesteps is None else [float(t) for t in set_up.timesteps]
    if given is None and _starts_clean(read, asked):
        given = [0.0]
    if given is not None:
        for name in (*SPACING_OPTIONS, "original_steps", "step_to"):
            options.pop(name, None)
    elif "sigmas" in options:
        options["sigma_timesteps"] = ",".join(np.format_float_positional(float(t), 6) for t in set_up.timesteps)
    solver = resolve(SolverOptions.parse(read.solver, options), own_timesteps=given is not None)
    found: StepKeywords = {"solver": solver.name, "solver_options": solver.explicit()}
    if given is not None:
        found["timesteps"] = given
    else:
        found["steps"] = asked.steps
    return found


def _starts_clean(read: Scheduler, asked: AskedSteps) -> bool:
    """A single step of ``linspace``, which diffusers places at timestep 0."""
    solver = find_solver(read.solver)
    spaced = solver.timesteps is None and not solver.extra_point and "sigma_max" not in read.options
    return spaced and asked.steps == 1 and read.spacing == "linspace"


def _check_asked(scheduler: Any, read: Scheduler, asked: AskedSteps) -> None:
    name = type(scheduler).__name__
    if asked.eta and read.solver not in ("ddim", "tcd"):
        raise BadInput(
            f"eta is {asked.eta:g}, and {name} does not use it",
            hint="leave it out, or set a DDIMScheduler or TCDScheduler",
        )

    if asked.timesteps is not None and asked.original_inference_steps is not None:
        raise BadInput(
            "original_inference_steps was given beside timesteps, which say themselves where the steps lie",
            hint="give one of the two",
        )
    if asked.steps is None:
        return
    train = read.noise.steps
    if read.places and read.spacing == "trailing" and len(np.arange(train, 0, -train / asked.steps)) != asked.steps:
        raise BadInput(
            f"num_inference_steps is {asked.steps}; with timestep_spacing 'trailing' {name} makes one step more of it, "
            "beyond the end of its noise schedule",
            hint=f"ask for {asked.steps - 1} or {asked.steps + 1} steps",
        )


def check_plan(scheduler: Any, asked: AskedSteps, plan: Plan) -> None:
    """Raises ``BadInput`` where the scheduler's own code places the steps elsewhere than ``plan`` does."""
    table, set_up = plan.table, _set_up(scheduler, asked)
    theirs = np.array([float(t) for t in set_up.timesteps])
    if theirs.shape != table.t.shape or (np.abs(theirs - table.t) > _APART).any():
        raise _elsewhere(scheduler, "timesteps", theirs, table.t)
    sigmas = getattr(set_up, "sigmas", None)
    if sigmas is not None and len(sigmas) == plan.steps + 1:
        levels = np.array([float(sigma) for sigma in sigmas])[:-1]
        if not _same_signal(1 / (1 + levels**2), 1 / (1 + table.sigma**2)):
            raise _elsewhere(scheduler, "noise levels", levels, table.sigma)


def more_noise(scheduler: Any, asked: AskedSteps, plan: Plan) -> np.float32:
    """The scheduler's first state over that of ``plan``, which does not know the spacing where timesteps are given:
    ``leading`` starts below the noisiest timestep, where signal has its share too (``init_noise_sigma``)."""
    ratio = float(_set_up(scheduler, asked).init_noise_sigma) / plan.init_scale
    return np.float32(1.0 if abs(ratio - 1) < 1e-5 else ratio)


def _same_signal(theirs: Array, ours: Array) -> bool:
    """Whether shares of signal, ``a**2 / (a**2 + s**2)``, are equal but for rounding to float32."""
    room = _CLOSE * np.minimum(ours, 1 - ours) + _ROUNDING
    return theirs.shape == ours.shape and bool((np.abs(theirs - ours) <= room).all())


def _elsewhere(scheduler: Any, what: str, theirs: Array, ours: Array) -> BadInput:
    first, second = (f"{len(each)} from {each[0]:.6g} to {each[-1]:.6g}" for each in (theirs, ours))
    return BadInput(
        f"the {what} of the pipeline's {type(scheduler).__name__} are {first}; those of its configuration are {second}",
        hint="use the class as diffusers has it, made from its configuration",
    )
