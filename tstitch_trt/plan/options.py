"""How the images of a request are drawn, as one record; ``None`` is "not said" in every field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.checks import (
    check_choice,
    check_number,
    check_text,
    check_whole,
    plain_number,
    read_items,
    read_mapping,
    read_pair,
    run_check,
    shown,
)
from tstitch_engines.errors import BadInput, BadSchedule, UnknownName, unknown_name
from tstitch_trt.plan.schedule import ROUNDINGS, check_fraction
from tstitch_trt.solvers import SolverOptions
from tstitch_trt.solvers.options import CHOICES

__all__ = ["DEFAULTS", "HISTORIES", "PlanKeywords", "PlanOptions", "StepKeywords", "unknown_keyword"]

HISTORIES: Final = ("keep", "reset")
DEFAULTS: Final[Mapping[str, object]] = MappingProxyType(
    {"history": "keep", "rounding": "paper", "guidance_rescale": 0.0, "start": 0, "solver_options": {}}
)
"""What a plan takes for an option that was not said, where the bundle has no default of its own."""

_LONGEST: Final = 100_000  # timesteps, or names in a schedule


class StepKeywords(TypedDict, total=False):
    """The keywords of both ``Runtime.plan`` and ``Runtime.sample``; see ``PlanOptions``."""

    steps: int | None
    solver: str | SolverOptions | None
    spacing: str | None
    sigmas: str | None
    eta: float | None
    variance: str | None
    solver_options: Mapping[str, object] | None
    timesteps: Iterable[float] | ArrayLike | None
    history: str | None
    schedule: str | Iterable[str] | None
    fraction: float | None
    rounding: str | None
    guidance: float | Mapping[str, float] | None
    guidance_rescale: float | None
    guidance_interval: tuple[int, int] | None
    guided_channels: int | None


class PlanKeywords(StepKeywords, total=False):
    """The keywords of ``Runtime.plan`` and ``make_plan``."""

    start: int | None


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How the steps of a trajectory are placed, run and shared among the members.

    ``solver``: a name, or ``SolverOptions``; ``spacing``, ``sigmas``, ``eta``, ``variance`` and ``solver_options``
    are its options. ``timesteps``: explicit ones in place of ``steps`` and a spacing. ``history``: whether a multistep
    solver keeps the estimates of the member before across a switch (``keep``, the default) or starts again (``reset``).

    ``schedule``: see ``tstitch_trt.plan.schedule``; ``fraction`` is the short form for the first and the last member.
    ``rounding`` turns fractions into steps (default ``paper``, see ``resolve`` there).

    ``guidance``: classifier-free guidance scale (arXiv 2207.12598), 1 = off; one number, or numbers by member, of which
    those without one have the bundle's default; the schedule's own ``:g=`` goes first. A member distilled for a scale
    (``Member.guidance_embedding``) takes it as an input and runs one half; a plain member beside it runs both. The
    others are for steps with two halves. ``guidance_rescale``: arXiv 2305.08891, section 3.4, 0 = off, the default.
    ``guidance_interval``: guide steps ``start <= i < stop`` only. ``guided_channels``: guide the first k channels.

    ``start``: the step at which the trajectory is entered, from a picture or a state; a multistep solver starts again
    there.

    Steps, solver, spacing, schedule and guidance that are not said come from the bundle's defaults. A value of a wrong
    type or out of range raises ``BadInput`` or one of its kinds when the record is made.
    """

    steps: int | None = None
    solver: str | SolverOptions | None = None
    spacing: str | None = None
    sigmas: str | None = None
    eta: float | None = None
    variance: str | None = None
    solver_options: Mapping[str, object] | None = None
    timesteps: tuple[float, ...] | None = None
    history: str | None = None
    schedule: str | tuple[str, ...] | None = None
    fraction: float | None = None
    rounding: str | None = None
    guidance: float | Mapping[str, float] | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[int, int] | None = None
    guided_channels: int | None = None
    start: int | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, run_check(check, value, name))
        if self.schedule is not None and self.fraction is not None:
            raise BadInput(
                f"both fraction {self.fraction:g} and schedule {shown(self.schedule)} are given",
                hint="a fraction is a short schedule: give one of the two",
            )

    @staticmethod
    def from_keywords(keywords: Mapping[str, object]) -> PlanOptions:
        """Raises ``UnknownName`` for a keyword that is no field, naming the nearest one."""
        for name in keywords:
            if name not in NAMES:
                raise unknown_keyword("plan", name, NAMES)
        return PlanOptions(**keywords)  # type: ignore[arg-type]  # __post_init__ checks the types

    def explicit(self) -> StepKeywords:
        """The fields that were said, by name, as keywords of ``Runtime.plan``; of ``sample`` too without ``start``."""
        said = {name: value for name in NAMES if (value := getattr(self, name)) is not None}
        return cast(StepKeywords, said)

    def on_top_of(self, others: PlanOptions) -> PlanOptions:
        """``others`` with all that was said here in place of its own."""
        return PlanOptions.from_keywords({**others.explicit(), **self.explicit()})

    def asked_steps(self, manifest: Manifest) -> int:
        """The steps that are asked for. A solver may make one evaluation more."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return manifest.defaults.steps if self.steps is None else self.steps


NAMES: Final = tuple(field.name for field in fields(PlanOptions))

_DIFFUSERS: Final[Mapping[str, str]] = {
    "num_inference_steps": "steps", "guidance_scale": "guidance", "scheduler": "solver",
    "num_images_per_prompt": "n", "num_images": "n", "batch_size": "n", "generator": "seed",
    "class_labels": "labels", "prompt_2": "prompt", "prompt_3": "prompt", "negative_prompt_2": "negative_prompt",
    "negative_prompt_3": "negative_prompt", "mask_image": "mask", "masked_image_latents": "masked_image",
    "control_image": "control", "controlnet_conditioning_scale": "control_scale", "init_image": "image",
    "crops_coords_top_left": "crop", "output_type": "decode", "callback_on_step_end": "callback",
}  # fmt: skip
"""Keywords of diffusers' pipelines and what they are called here."""


def unknown_keyword(verb: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a keyword that ``verb`` does not have. Names of diffusers' pipelines are translated."""
    ours, known = _DIFFUSERS.get(name), list(known)
    if ours in known:
        return UnknownName(
            f"unknown keyword of {verb} {name!r}: {name} is {ours} here; known: {', '.join(known)}",
            hint=f"did you mean {ours}=?",
        )
    return unknown_name(f"keyword of {verb}", name, known)


# --- the checks of the fields


def _solver(value: object, what: str) -> str | SolverOptions:
    return value if isinstance(value, SolverOptions) else check_text(value, what, example="ddim", most=100)


def _solver_options(value: object, what: str) -> Mapping[str, object]:
    return {name: _plain(option) for name, option in read_mapping(value, what, example='{"eta": 0.5}').items()}


def _plain(option: object) -> object:
    """A solver's option in Python's own type; its range is the solver's."""
    if isinstance(option, bool | np.bool_):
        return bool(option)
    if isinstance(option, str):
        return str.__str__(option)
    number = plain_number(option)
    return option if number is None else number


def _timesteps(value: object, what: str) -> tuple[float, ...]:
    items = read_items(value, what, _LONGEST, allowed="is a list of falling timesteps", example="[900, 600, 300]")
    return tuple(check_number(each, what, 0, 1e9) for each in items)


def _schedule(value: object, what: str) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return check_text(value, what, example="small:0.4,large")
    forms = "is a text, or a list with the member of each step"
    try:
        items = read_items(value, what, _LONGEST, allowed=forms, example='"small:0.4,large"')
    except BadInput as error:
        raise BadSchedule(error.message, hint=error.hint) from None
    return tuple(check_text(name, "a member in schedule", example="small", most=1000) for name in items)


def _guidance(value: object, what: str) -> float | Mapping[str, float]:
    if not isinstance(value, Mapping):
        return check_number(value, what)  # its range is the member's
    scales = read_mapping(value, what, example='{"small": 1.0, "large": 4.0}')
    return {name: check_number(scale, f"{what} of {name!r}") for name, scale in scales.items()}


def _interval(value: object, what: str) -> tuple[int, int]:
    start, stop = read_pair(value, what, "are two whole numbers, START and STOP", "(10, 40) to guide steps 10 to 39")
    return check_whole(start, f"START of {what}"), check_whole(stop, f"STOP of {what}")


def _choice(allowed: Sequence[str]) -> Callable[[object, str], str]:
    return lambda value, what: check_choice(value, what, allowed)


_CHECKS: Final[Mapping[str, Callable[[object, str], object]]] = {
    "steps": lambda value, what: check_whole(
        value, what, 1
    ),  # the length of the noise schedule bounds it when the table is made
    "solver": _solver,
    "spacing": _choice(CHOICES["spacing"]),
    "sigmas": _choice(CHOICES["sigmas"]),
    "eta": check_number,  # its range is the solver's
    "variance": _choice(CHOICES["variance"]),
    "solver_options": _solver_options,
    "timesteps": _timesteps,
    "history": _choice(HISTORIES),
    "schedule": _schedule,
    "fraction": check_fraction,
    "rounding": _choice(ROUNDINGS),
    "guidance": _guidance,
    "guidance_rescale": lambda value, what: check_number(value, what, 0, 1),
    "guidance_interval": _interval,
    "guided_channels": check_whole,
    "start": check_whole,
}
