"""The options of solvers, checked before a noise schedule or a step count is known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tstitch_engines.checks import plain_number, shown
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.solvers.spacing import SIGMA_SPACINGS, SPACINGS

__all__ = [
    "CHOICES",
    "OPTION_NAMES",
    "ROUNDING_RULES",
    "SPACING_OPTIONS",
    "SolverOptions",
    "listed_timesteps",
    "uncorrected_steps",
]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "spacing": SPACINGS,
    "sigmas": SIGMA_SPACINGS,
    "final": ("zero", "sigma-min", "last"),
    "variance": ("fixed-small", "fixed-large", "learned"),
    "variant": ("diffusers", "k-diffusion"),
    "sigma_ends": ("schedule", "spacing"),
    "step_to": ("next", "stride"),
    "remember": ("eps", "v"),
    "restart": ("plain", "repeat"),
    "second_order": ("midpoint", "heun"),
    "middle": ("diffusers", "paper"),
    "formula": ("bh1", "bh2"),
}
_MOST = 1e9  # beyond any noise level, offset or order; what has no bound of its own ends here
ROUNDING_RULES = ("exact", "nearest", "down")
_NUMBER = re.compile(r"\d{1,9}(\.\d{0,9})?")
_SWITCHES = ("lower_order_final", "euler_at_final", "last_noise")
_REALS: Mapping[str, tuple[float, float]] = {
    "eta": (0.0, 1.0),
    "s_noise": (0.0, math.inf),
    "sigma_min": (0.0, math.inf),
    "sigma_max": (0.0, math.inf),
    "timestep_scaling": (0.0, math.inf),
    "lambda_min": (-_MOST, math.inf),
}
_WHOLES: Mapping[str, tuple[int, float]] = {
    "steps_offset": (0, math.inf),
    "original_steps": (1, math.inf),
    "order": (1, 3),
}
SPACING_OPTIONS = (
    "spacing", "steps_offset", "lambda_min", "sigmas", "sigma_min", "sigma_max", "sigma_ends", "sigma_timesteps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """A solver and its options; ``None`` means "not said" and becomes the solver's own default.

    An option that the solver (or the chosen spacing) does not use is an error when the table is made: nothing is
    ignored. Values of a wrong type or range raise ``BadInput`` here, unknown choices ``UnknownName``.
    """

    name: str = "ddim"
    spacing: str | None = None  # where the timesteps lie (``spacing.SPACINGS``); default "dit"
    steps_offset: int | None = None  # shifts spacing "leading"; default 0
    lambda_min: float | None = None  # spacing leaves out timesteps whose log(signal/noise) is below this
    sigmas: str | None = None  # instead of a timestep spacing, a sigma spacing (``spacing.SIGMA_SPACINGS``)
    sigma_min: float | None = None  # ends of the sigma spacing; default: those that sigma_ends names
    sigma_max: float | None = None
    sigma_ends: str | None = None  # of the noise schedule, or of the timestep spacing, which is then given too
    sigma_timesteps: str | None = None  # at these sigmas: exact, rounded (nearest, down), or as listed: "999,870,..."
    final: str | None = None  # noise left after the last step: "zero", "sigma-min" (of timestep 0), "last" (it rests)
    eta: float | None = None  # share of the noise that is drawn afresh: 0 = deterministic, 1 = ancestral
    s_noise: float | None = None  # factor on the drawn noise, as in k-diffusion
    variance: str | None = None  # of DDPM's noise
    last_noise: bool | None = None  # DDPM: noise in the last step too, unless it is at timestep 0
    variant: str | None = None  # of the third-order formula of dpmpp-3m-sde
    original_steps: int | None = None  # LCM: length of the chain it was distilled on
    timestep_scaling: float | None = None  # LCM: factor on the timestep in its boundary scalings
    step_to: str | None = None  # where a step ends: the next timestep, or one "stride" of T // N below its own
    remember: str | None = None  # PNDM extrapolates the noise, or the velocity (diffusers for v-prediction)
    restart: str | None = None  # PNDM after a restart: goes on step by step, or repeats the first step (diffusers)
    second_order: str | None = None  # DPM-Solver++: formula of the second-order steps
    middle: str | None = None  # DPM-Solver++ singlestep of order 3: formula of the second row of a block
    lower_order_final: bool | None = None  # lower the order near the end
    euler_at_final: bool | None = None  # the last step of order 1
    order: int | None = None  # UniPC
    formula: str | None = None  # UniPC: its B(h)
    uncorrected: str | None = None  # UniPC: steps that are not corrected, e.g. "0,1"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise BadInput(f"solver is a {type(self.name).__name__}; allowed is a name", hint='e.g. solver="ddim"')
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value in allowed):
                raise unknown_name(name, value if isinstance(value, str) else shown(value), allowed)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool | None):
                raise BadInput(
                    f"solver option {name} is {shown(getattr(self, name))}; allowed is True or False",
                    hint=f"set {name} to True or False, or leave it out",
                )
        if self.uncorrected is not None:
            uncorrected_steps(self.uncorrected)
        if self.sigma_timesteps is not None:
            listed_timesteps(self.sigma_timesteps)
        for name, (low, high) in (*_REALS.items(), *_WHOLES.items()):
            value = getattr(self, name)
            if value is None:
                continue
            kind, what = (int, "a whole number") if name in _WHOLES else (int | float, "a number")
            number = plain_number(value)
            if not isinstance(number, kind) or not low <= number <= min(high, _MOST):
                bounds = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
                raise BadInput(
                    f"solver option {name} is {shown(value)}; allowed is {what} {bounds}",
                    hint=f"set {name} to {what} {bounds}, or leave it out",
                )
            object.__setattr__(self, name, number)

    @staticmethod
    def parse(name: str, values: Mapping[str, object]) -> SolverOptions:
        """From names and values (JSON, the command line). Raises ``UnknownName`` for an option that does not exist."""
        for key in values:
            if key not in OPTION_NAMES:
                raise unknown_name("solver option", key, OPTION_NAMES)
        return SolverOptions(name=name, **values)  # type: ignore[arg-type]  # __post_init__ checks types

    def explicit(self) -> dict[str, str | int | float | bool]:
        """The options that were said, without the name."""
        return {name: value for name in OPTION_NAMES if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.explicit().items())
        return f"{self.name}({options})" if options else self.name


def uncorrected_steps(text: str) -> frozenset[int]:
    """``"0,1"`` -> ``{0, 1}``; an empty text is none. Raises ``BadInput``."""
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else ["-"]
    if parts == [""]:
        return frozenset()
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise BadInput(
            f"solver option uncorrected is {shown(text)}; allowed are step numbers from 0 on, with commas between",
            hint='write it as e.g. "0,1", or leave it out to correct every step',
        )
    return frozenset(int(part) for part in parts)


def listed_timesteps(text: str) -> tuple[float, ...] | None:
    """The timesteps that are listed in ``sigma_timesteps``, ``None`` where it is a rule. Raises ``BadInput``."""
    if text in ROUNDING_RULES:
        return None
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else ["-"]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        raise BadInput(
            f"solver option sigma_timesteps is {shown(text)}; allowed is {', '.join(ROUNDING_RULES)}, or a "
            "timestep for each step with commas between",
            hint='e.g. "exact", or "999,870,702" for three steps',
        )
    return tuple(float(part) for part in parts)


OPTION_NAMES = tuple(field.name for field in fields(SolverOptions) if field.name != "name")
