"""The known solvers, and their default options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.solvers.base import Solver
from tstitch_trt.solvers.ddim import DDIM
from tstitch_trt.solvers.ddpm import DDPM
from tstitch_trt.solvers.dpmpp import DPMPP_1, DPMPP_1_SDE, DPMPP_2M, DPMPP_2M_SDE, DPMPP_3M, DPMPP_3M_SDE
from tstitch_trt.solvers.dpmpp_singlestep import DPMPP_2S, DPMPP_3S
from tstitch_trt.solvers.euler import EULER, EULER_ANCESTRAL
from tstitch_trt.solvers.lcm import LCM
from tstitch_trt.solvers.options import SPACING_OPTIONS, SolverOptions
from tstitch_trt.solvers.pndm import PNDM
from tstitch_trt.solvers.tcd import TCD
from tstitch_trt.solvers.unipc import UNIPC

__all__ = ["DEFAULT_SPACING", "SOLVERS", "find_solver", "idle_options", "resolve", "with_default_spacing"]

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        solver.name: solver
        for solver in (
            DDIM, DDPM, EULER, EULER_ANCESTRAL, DPMPP_1, DPMPP_1_SDE, DPMPP_2M, DPMPP_2M_SDE, DPMPP_3M, DPMPP_3M_SDE,
            DPMPP_2S, DPMPP_3S, UNIPC, PNDM, LCM, TCD,
        )
    }
)  # fmt: skip
DEFAULT_SPACING = "dit"


def find_solver(name: str) -> Solver:
    """The solver called ``name``. Raises ``UnknownName``."""
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    return SOLVERS[name]


def with_default_spacing(options: SolverOptions, spacing: str, steps_offset: int | None = None) -> SolverOptions:
    """``options`` with a bundle's default ``spacing`` where the solver takes one and none is given.

    ``steps_offset`` goes with the spacing ``leading``, unless one is given.
    """
    placed = options.spacing or (options.sigmas and options.sigma_ends != "spacing")
    if find_solver(options.name).timesteps is not None or placed:
        return options
    if spacing == "leading" and options.steps_offset is None:
        return replace(options, spacing=spacing, steps_offset=steps_offset)
    return replace(options, spacing=spacing)


def resolve(options: SolverOptions, *, own_timesteps: bool = False) -> SolverOptions:
    """``options`` with every default filled in; what is still ``None`` is not used.

    ``own_timesteps``: timesteps are given one by one, so there is no spacing. Raises ``UnknownName`` for the solver
    and ``BadInput`` for an option that the solver or the spacing would have to ignore.
    """
    solver = find_solver(options.name)
    known = (*solver.defaults, *(() if solver.timesteps else SPACING_OPTIONS))
    for name, value in options.explicit().items():
        if name not in known:
            raise BadInput(
                f"solver {solver.name!r} does not use {name}={value!r}; its options: {', '.join(sorted(known))}",
                hint=f"leave {name} out, or choose a solver that has it: {', '.join(_having(name))}",
            )
        if own_timesteps and (name in SPACING_OPTIONS or name == "original_steps"):
            _clash(name, value, "timesteps", "the timesteps are given one by one")
        if own_timesteps and name == "step_to" and value == "stride":
            _clash(name, value, "timesteps", "the strides of timesteps that are given one by one are all their own")
        if options.sigmas and options.sigma_ends != "spacing" and name in ("spacing", "steps_offset", "lambda_min"):
            _clash(name, value, "sigmas", f"the steps follow the {options.sigmas} sigmas")
        if options.sigmas and name == "step_to" and value == "stride":
            _clash(name, value, "sigmas", f"the steps follow the {options.sigmas} sigmas")
        if not options.sigmas and name in ("sigma_min", "sigma_max", "sigma_ends", "sigma_timesteps"):
            raise BadInput(
                f"{name}={value!r} needs a sigma spacing, and none is asked for",
                hint=f"add sigmas='karras' or sigmas='exponential', or leave {name} out",
            )
        if name == "steps_offset" and options.spacing != "leading":
            raise BadInput(
                f"steps_offset={value!r} is for spacing 'leading' only; got spacing {options.spacing!r}",
                hint="add spacing='leading', or leave steps_offset out",
            )
    filled: dict[str, str | int | float | bool] = dict(solver.defaults)
    if own_timesteps:
        filled.pop("original_steps", None)
    elif options.sigmas:
        filled |= {"sigma_ends": "schedule", "sigma_timesteps": "exact"}
    if not own_timesteps and solver.timesteps is None and (not options.sigmas or options.sigma_ends == "spacing"):
        filled["spacing"] = options.spacing or DEFAULT_SPACING
        if options.spacing == "leading":
            filled["steps_offset"] = 0
    for name, why in idle_options(options).items():
        if getattr(options, name) not in (None, False):  # a switch that is off asks for nothing
            raise BadInput(f"{name}={getattr(options, name)!r} would be ignored: {why}", hint=f"leave {name} out")
        options = replace(options, **{name: None})  # type: ignore[arg-type]  # None is allowed for every option
        filled.pop(name, None)
    return replace(options, **{**filled, **options.explicit()})  # type: ignore[arg-type]  # values come from checked options


def idle_options(options: SolverOptions) -> Mapping[str, str]:
    """The solver's options that have no effect beside the others and the solver's defaults, and why."""
    solver = find_solver(options.name)
    known = {name: value for name, value in options.explicit().items() if name in solver.defaults}
    return solver.idle(SolverOptions.parse(solver.name, {**solver.defaults, **known}))


def _having(name: str) -> list[str]:
    return [
        solver.name
        for solver in SOLVERS.values()
        if name in solver.defaults or (name in SPACING_OPTIONS and solver.timesteps is None)
    ]


def _clash(name: str, value: object, other: str, why: str) -> None:
    raise BadInput(f"{name}={value!r} would be ignored: {why}", hint=f"give either {name} or {other}")
