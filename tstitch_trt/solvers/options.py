"""What can be asked of a solver, before a noise schedule or a step count is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.spacing import SIGMA_SPACINGS, SPACINGS

__all__ = ["CHOICES", "OPTION_NAMES", "SPACING_OPTIONS", "SolverOptions"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "spacing": SPACINGS,
    "sigmas": SIGMA_SPACINGS,
    "final": ("zero", "sigma-min"),
    "variance": ("fixed-small", "fixed-large", "learned"),
    "variant": ("diffusers", "k-diffusion"),
}
_REALS: Mapping[str, tuple[float, float]] = {
    "eta": (0.0, 1.0),
    "s_noise": (0.0, math.inf),
    "sigma_min": (0.0, math.inf),
    "sigma_max": (0.0, math.inf),
}
_WHOLES: Mapping[str, tuple[int, float]] = {"steps_offset": (0, math.inf), "original_steps": (1, math.inf)}
SPACING_OPTIONS = ("spacing", "steps_offset", "sigmas", "sigma_min", "sigma_max")


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """A solver and its options; ``None`` means "not said" and becomes the solver's own default.

    An option that the solver (or the chosen spacing) does not use is an error when the table is made: nothing is
    ignored. Values of a wrong type or range raise ``BadInput`` here, unknown choices ``UnknownName``.
    """

    name: str = "ddim"
    spacing: str | None = None  # where the timesteps lie (``spacing.SPACINGS``); default "dit"
    steps_offset: int | None = None  # shifts spacing "leading"; default 0
    sigmas: str | None = None  # instead of a timestep spacing, a sigma spacing (``spacing.SIGMA_SPACINGS``)
    sigma_min: float | None = None  # ends of the sigma spacing; default: those of the noise schedule
    sigma_max: float | None = None
    final: str | None = None  # noise left after the last step: "zero", or "sigma-min", that of timestep 0
    eta: float | None = None  # share of the noise that is drawn afresh: 0 = deterministic, 1 = ancestral
    s_noise: float | None = None  # factor on the drawn noise, as in k-diffusion
    variance: str | None = None  # of DDPM's noise
    variant: str | None = None  # of the third-order formula of dpmpp-3m-sde
    original_steps: int | None = None  # LCM: length of the chain it was distilled on

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise unknown_name(name, str(value), allowed)
        for name, (low, high) in (*_REALS.items(), *_WHOLES.items()):
            value = getattr(self, name)
            if value is None:
                continue
            kind, what = (int, "a whole number") if name in _WHOLES else (int | float, "a number")
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or value == math.inf:
                bounds = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
                raise BadInput(
                    f"solver option {name} is {value!r}; allowed is {what} {bounds}",
                    hint=f"set {name} to {what} {bounds}, or leave it out",
                )

    @staticmethod
    def parse(name: str, values: Mapping[str, object]) -> SolverOptions:
        """From names and values (JSON, the command line). Raises ``UnknownName`` for an option that does not exist."""
        for key in values:
            if key not in OPTION_NAMES:
                raise unknown_name("solver option", key, OPTION_NAMES)
        return SolverOptions(name=name, **values)  # type: ignore[arg-type]  # __post_init__ checks types

    def said(self) -> dict[str, str | int | float]:
        """The options that are not ``None``, without the name."""
        return {name: value for name in OPTION_NAMES if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.said().items())
        return f"{self.name}({said})" if said else self.name


OPTION_NAMES = tuple(field.name for field in fields(SolverOptions) if field.name != "name")
