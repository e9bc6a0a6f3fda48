"""Every scheduler of diffusers and every key of its constructor: honoured, without effect, or refused with why.

What changes the scheduler that ``read_scheduler`` gives is honoured; tests/tstitch_trt/solvers compare the pictures.
What changes nothing is tried in diffusers too, where it must change nothing either.
"""

from __future__ import annotations

import inspect
import logging
import re
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import numpy as np

from support.compatibility.markdown import attempt, code, codes, table
from support.denoiser import draw, estimate
from support.diffusers_trajectory import run_theirs
from tstitch_engines.bundle.scheduler_config import SCHEDULERS, Scheduler, read_scheduler

__all__ = ["scheduler_section"]

Config = Mapping[str, Any]

_STEPS: Final = 10
_SAME: Final = 1e-4  # relative
# What to try of keys whose annotation does not say it
_TRIED: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_train_timesteps": (500,),
    "beta_start": (0.001,),
    "beta_end": (0.015,),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "interpolation_type": ("linear", "log_linear"),
    "trained_betas": (np.linspace(0.001, 0.03, 1000).tolist(),),
    "steps_offset": (1,),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"),
    "original_inference_steps": (100,),
    "timestep_scaling": (5.0,),
    "disable_corrector": ([0],),
    "solver_p": (None,),
    "sigma_min": (0.1,),
    "sigma_max": (10.0,),
    "lambda_min_clipped": (-5.1,),
    "clip_sample_range": (2.0,),
    "dynamic_thresholding_ratio": (0.9,),
    "sample_max_value": (2.0,),
    "flow_shift": (3.0,),
    "shift_terminal": (0.1,),
}
_CHOICES: Final = re.compile(r"('[\w+-]+'( or )?)+|\d or \d")
# Keys that only matter beside others
_BESIDE: Final[tuple[Config, ...]] = (
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"final_sigmas_type": "sigma_min"},
    {"solver_order": 3},
    {"prediction_type": "v_prediction"},
)


_DRAWN: Final[dict[tuple[str, str], Any]] = {}  # by class and configuration


@dataclass(frozen=True)
class _Outcome:
    """``honoured`` and ``idle``: values; ``refused``: values with why."""

    honoured: tuple[str, ...]
    idle: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


def scheduler_section() -> str:
    from diffusers import schedulers

    found = [name for name in dir(schedulers) if name.endswith("Scheduler")]
    known = [name for name in SCHEDULERS if name in found]
    rows: dict[tuple[str, _Outcome], list[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in known:
            for key, outcome in _keys(name):
                rows.setdefault((key, outcome), []).append(name)
    order = {key: index for index, key in enumerate(dict.fromkeys(key for key, _ in rows))}
    lines = [
        (code(key), "all" if len(names) == len(known) else _short(names), *_cells(outcome))
        for (key, outcome), names in sorted(rows.items(), key=lambda item: order[item[0][0]])
    ]
    others = sorted(name for name in found if name not in SCHEDULERS and name != "SchedulerMixin")
    _, why = attempt(lambda: read_scheduler({"_class_name": "SCMScheduler"}))
    assert why is not None
    return "\n\n".join(
        [
            "## Schedulers",
            f"These schedulers are read: {codes(known)}. With `accelerate`, a subclass is read as its base class.",
            "All others of diffusers are refused as unknown: " + codes(others) + ".",
            "If a pipeline's scheduler can't be read, `build` says so and keeps that of the recipe. An accelerated "
            "pipeline refuses to draw until it is given another scheduler.",
            "The table has the keys of each class. Keys without effect here were tried in diffusers too, and change "
            "nothing there. Keys of other classes, which `from_config` carries along, are ignored where diffusers "
            "ignores them" + (f", except {foreign}." if (foreign := _foreign(known)) else "."),
            table(("key", "classes", "honoured", "without effect", "refused"), lines),
        ]
    )


def _short(names: list[str]) -> str:
    return ", ".join(name.removesuffix("Scheduler") for name in names)


def _cells(outcome: _Outcome) -> tuple[str, str, str]:
    by_reason: dict[str, list[str]] = {}
    for value, why in outcome.refused:
        by_reason.setdefault(why, []).append(value)
    refused = [", ".join(values) + (f": {why}" if why else "") for why, values in by_reason.items()]
    return ", ".join(outcome.honoured), ", ".join(outcome.idle), "; ".join(refused)


def _foreign(known: list[str]) -> str:
    """Keys that a class does not have and that are honoured or refused nevertheless."""
    every = {key: parameter for name in known for key, parameter in _parameters(name).items()}
    found: dict[str, list[str]] = {}
    for name in known:
        base = _base(name)
        for key, parameter in every.items():
            if key in _parameters(name):
                continue
            for value in _values(parameter):
                if value == parameter.default:
                    continue
                kind, _ = _try(name, base, key, value, others=_BESIDE[:1])
                if kind != "idle":
                    found.setdefault(f"{code(key)} ({kind})", []).append(name)
    return "; ".join(f"{key} of {_short([*dict.fromkeys(names)])}" for key, names in found.items())


def _keys(name: str) -> Iterator[tuple[str, _Outcome]]:
    base = _base(name)
    for parameter in _parameters(name).values():
        honoured, idle, refused = [], [], []
        values = _values(parameter)
        for value in values:
            shown = _shown(parameter.name, value)
            kind, why = _try(name, base, parameter.name, value)
            if kind == "refused":
                default = " (the default)" if value == parameter.default else ""
                refused.append((f"{shown}{default}", why))
            elif kind == "idle":
                idle.append(shown)
            else:
                honoured.append(f"{shown}{why}")
        yield parameter.name, _Outcome(tuple(honoured), tuple(idle), tuple(refused))


def _values(parameter: inspect.Parameter) -> list[Any]:
    """What to try: the choices of the annotation, both states of a switch, and what ``_TRIED`` has for the key."""
    annotated = parameter.annotation
    choices = [
        choice
        for part in (annotated, *typing.get_args(annotated))
        if typing.get_origin(part) is typing.Literal
        for choice in typing.get_args(part)
    ]
    if isinstance(parameter.default, bool):
        choices = [True, False]
    tried = _TRIED.get(parameter.name, ())
    found = [*tried, *(choice for choice in choices if choice not in tried)]
    assert found, f"nothing to try of the key {parameter.name} ({parameter}): add it to _TRIED"
    return found


def _shown(key: str, value: Any) -> str:
    if key == "trained_betas":
        return "a list"
    if isinstance(value, bool) or value is None:
        return code({True: "true", False: "false", None: "null"}[value])
    if isinstance(value, int | float) and key != "solver_order":
        return "any number"
    return code(value)


def _base(name: str) -> Config:
    """The defaults of the class, changed where one of them is refused."""
    base: dict[str, Any] = {}
    for key, value in (("clip_sample", False), ("skip_prk_steps", True)):
        found, why = attempt(lambda: read_scheduler({"_class_name": name, **base}))
        if found is None and why is not None and f" {key} is " in why:
            base[key] = value
    read_scheduler({"_class_name": name, **base})
    return base


def _try(name: str, base: Config, key: str, value: Any, others: tuple[Config, ...] = _BESIDE) -> tuple[str, str]:
    """``honoured``, ``idle`` or ``refused``, and with which other keys or why."""
    ours, why = _read(name, {**base, key: value})
    if why is not None:
        return "refused", _reason(why, key)
    rest = {other: v for other, v in base.items() if other != key}
    without = _read(name, rest)[0] if key not in base else _read(name, base)[0]
    own = _parameters(name)
    if (key in own and value == own[key].default) or ours != without or (key in base and value == base[key]):
        return "honoured", ""
    _same_in_diffusers(name, base, key, value)
    for beside in others:
        if key in beside or not set(beside) <= _parameters(name).keys():
            continue
        first, refused = _read(name, {**base, **beside})
        if refused is not None:
            continue
        second, refused = _read(name, {**base, **beside, key: value})
        if refused is not None:
            return "refused", f"beside {_pairs(beside)} {_reason(refused, key)}".rstrip()
        if first != second:
            return "honoured", f" beside {_pairs(beside)}"
        _same_in_diffusers(name, {**base, **beside}, key, value)
    return "idle", ""


def _pairs(config: Config) -> str:
    return " and ".join(code(key if value is True else f"{key}={value}") for key, value in config.items())


def _read(name: str, config: Config) -> tuple[Scheduler | None, str | None]:
    found, why = attempt(lambda: read_scheduler({"_class_name": name, **config}))
    if isinstance(found, Scheduler) and not found.places:  # its spacing is for other solvers
        found = replace(found, spacing="")
    return found, why  # type: ignore[return-value]


def _reason(message: str, key: str) -> str:
    about, _, allowed = message.partition("; allowed is ")
    other = "" if f" {key} is " in about else about.partition(": ")[2] + ": "
    if _CHOICES.fullmatch(allowed):
        return other  # as the column of those that are honoured says
    return f"{other}only {allowed}"


@cache
def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    from diffusers import schedulers

    found = inspect.signature(getattr(schedulers, name).__init__).parameters
    return {key: parameter for key, parameter in found.items() if key != "self"}


def _same_in_diffusers(name: str, base: Config, key: str, value: Any) -> None:
    """Raises ``AssertionError`` where diffusers draws something else with this value, which ours does not see."""
    want, got = _drawn(name, base), _drawn(name, {**base, key: value})
    if want is None or got is None:
        return
    equal = want.shape == got.shape and np.abs(want - got).max() <= _SAME * np.abs(want).max()
    assert equal, (
        f"{name}: {key}={value!r} beside {dict(base)} changes diffusers' pictures, and read_scheduler ignores it"
    )


def _drawn(name: str, config: Config) -> Any:
    """The latents of a trajectory in diffusers; ``None`` where it can't draw one."""
    key = name, repr(sorted(config.items()))
    if key not in _DRAWN:
        _DRAWN[key] = _draw(name, config)
    return _DRAWN[key]


def _draw(name: str, config: Config) -> Any:
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    x, noise = draw(4 * _STEPS)
    try:
        scheduler = getattr(diffusers, name).from_config(dict(config))
        scheduler.set_timesteps(_STEPS)
        return run_theirs(scheduler, lambda seen, t, _: estimate(seen, t), x * float(scheduler.init_noise_sigma), noise)
    except (ValueError, TypeError, NotImplementedError, IndexError, AttributeError):
        return None
