"""docs/reference/schedules.md from the rules of rounding, the solvers and their options."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Final

import numpy as np

from support.compatibility.markdown import code, codes, table
from tstitch_engines.bundle.scheduler_config import SCHEDULERS, read_scheduler
from tstitch_engines.errors import BadInput
from tstitch_trt.plan.schedule import ROUNDINGS, resolve
from tstitch_trt.solvers import SOLVERS
from tstitch_trt.solvers.options import CHOICES, OPTION_NAMES, ROUNDING_RULES, SPACING_OPTIONS, SolverOptions
from tstitch_trt.solvers.spacing import space_timesteps

__all__ = ["rounding", "solver_options", "solvers"]

_RULES: Final[Mapping[str, str]] = {
    "paper": "round(r N), halves to the even number: T-Stitch's own (the default)",
    "floor": "floor(r N)",
    "lcm": "floor(r N) + 1, at most N; none for r = 0",
    "timestep": "the steps with t / T >= 1 - r",
    "timestep-strict": "the steps with t / T > 1 - r",
}
_EXAMPLES: Final = ((0.25, 10), (0.35, 10), (0.4, 50))
_MEANINGS: Final[Mapping[str, str]] = {
    "spacing": "where the timesteps lie; [below](#spacings)",
    "steps_offset": "shifts the timesteps of spacing `leading`",
    "lambda_min": "leaves out timesteps whose log(signal / noise) is below it",
    "sigmas": "places the steps by sigma instead of a timestep spacing",
    "sigma_min": "the smallest sigma of `sigmas`",
    "sigma_max": "the largest sigma of `sigmas`",
    "sigma_ends": "where `sigma_min` and `sigma_max` come from: the noise schedule, or the timestep spacing",
    "sigma_timesteps": "the timestep at each sigma: exact, rounded, or listed (`999,870,702`)",
    "final": "the noise that is left at the end: none, that of timestep 0, or that of the last timestep",
    "eta": "the share of the noise that is drawn anew: 0 is deterministic, 1 ancestral",
    "s_noise": "a factor on the noise that is drawn, as in k-diffusion",
    "variance": "the variance of DDPM's noise",
    "last_noise": "draws noise in the last step too, unless that is at timestep 0",
    "variant": "which formula of order 3",
    "original_steps": "length of the chain that the model was distilled on",
    "timestep_scaling": "a factor on the timestep in the boundary scalings",
    "step_to": "where a step ends: at the next timestep, or T // N below its own as in diffusers",
    "remember": "what is extrapolated: the noise, or the velocity (diffusers, for v-prediction)",
    "restart": "the step after a restart: an ordinary one, or the first one again as in diffusers",
    "second_order": "the formula of steps of order 2",
    "middle": "the formula of the second step in a block of three",
    "lower_order_final": "lowers the order near the end",
    "euler_at_final": "the last step is of order 1",
    "order": "highest order",
    "formula": "its function B(h)",
    "uncorrected": "steps that are not corrected, e.g. `0,1`",
}
_SPACINGS: Final[Mapping[str, str]] = {
    "dit": "whole timesteps a fractional stride apart, as the published DiT and Improved DDPM samplers",
    "leading": "from 0 up in whole strides, as in diffusers; `steps_offset` shifts them",
    "linspace": "evenly from the noisiest to 0, rounded, as in diffusers",
    "trailing": "from the noisiest down in strides, as in diffusers",
    "uniform": "`linspace` without rounding",
}


def rounding() -> str:
    assert _RULES.keys() == set(ROUNDINGS)
    head = ("rule", "steps of the first member", *(f"r = {r}, N = {n}" for r, n in _EXAMPLES))
    return table(
        head, ([code(name), _RULES[name], *(_rounded(name, r, n) for r, n in _EXAMPLES)] for name in ROUNDINGS)
    )


def _rounded(rule: str, share: float, steps: int) -> str:
    found = resolve(
        f"a:{share},b",
        members=("a", "b"),
        timesteps=space_timesteps("dit", steps, train_steps=1000),
        sigmas=np.zeros(steps),
        train_steps=1000,
        rounding=rule,
    )
    return str(found.counts.get("a", 0))


def solvers() -> str:
    rows = [
        (code(name), solver.summary, _schedulers(name), codes(solver.defaults) or "none")
        for name, solver in SOLVERS.items()
    ]
    return table(("solver", "what it is", "scheduler of diffusers", "options of its own"), rows)


def _schedulers(name: str) -> str:
    """The classes that are read as this solver, with the keys that make them it."""
    found = []
    for kind in SCHEDULERS:
        if "Parallel" in kind:  # the same as the class without it
            continue
        for order, algorithm in product((None, 1, 2, 3), (None, "sde-dpmsolver++")):
            keys = {"solver_order": order, "algorithm_type": algorithm}
            said = {key: value for key, value in keys.items() if value is not None}
            usual = {"clip_sample": False, "skip_prk_steps": True}
            try:
                read = read_scheduler({"_class_name": kind, **usual, **said})
            except BadInput:
                continue
            if read.solver == name:
                more = ", ".join(f"`{key}={value}`" for key, value in said.items())
                found.append(code(kind) + (f" with {more}" if more else ""))
                break
    return ", ".join(found)


def solver_options() -> str:
    assert _MEANINGS.keys() == set(OPTION_NAMES)
    rows = []
    for name in OPTION_NAMES:
        having = [solver for solver in SOLVERS.values() if name in solver.defaults]
        who = f"all but {_own_timesteps()}" if name in SPACING_OPTIONS else codes(solver.name for solver in having)
        defaults = {
            str(solver.defaults[name]).replace("True", "true").replace("False", "false") for solver in having
        } - {""}
        rows.append([code(name), _values(name), _MEANINGS[name], codes(sorted(defaults)), who])
    spacings = [[code(name), text, codes(_timesteps(name))] for name, text in _SPACINGS.items()]
    assert _SPACINGS.keys() == set(CHOICES["spacing"])
    return "\n\n".join(
        [
            table(("option", "values", "meaning", "default", "solvers"), rows),
            "### Spacings",
            table(("spacing", "timesteps", "5 of 1000"), spacings),
        ]
    )


def _own_timesteps() -> str:
    return " and ".join(code(solver.name) for solver in SOLVERS.values() if solver.timesteps is not None)


def _timesteps(spacing: str) -> list[str]:
    return [f"{value:g}" for value in space_timesteps(spacing, 5, train_steps=1000, rounded=spacing != "uniform")]


def _values(name: str) -> str:
    if name in CHOICES:
        return codes(CHOICES[name])
    if name == "sigma_timesteps":
        return f"{codes(ROUNDING_RULES)}, or a list"
    if name == "uncorrected":
        return "numbers of steps"
    for value, words in ((True, "`true`, `false`"), (0.5, "a number"), (2, "a whole number")):
        try:
            SolverOptions(**{name: value})  # type: ignore[arg-type]
        except BadInput:
            continue
        return words
    raise AssertionError(name)
