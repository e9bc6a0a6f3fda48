"""diffusers' ``scheduler_config.json`` as our own terms: a solver with options, a spacing, a noise schedule.

The solver's table then equals ``SchedulerClass.from_config(config)``. A missing key has the default of its class in
diffusers; a key that no table can express is an error. Keys that the class does not read are ignored, as there: those
of other classes, which ``from_config`` carries along, and its own where another key decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tstitch_engines.bundle.manifest import NoiseScheduleSpec, Option, PredictionType
from tstitch_engines.errors import BadInput, unknown_name

__all__ = ["SCHEDULERS", "Scheduler", "read_scheduler", "read_training"]


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What a scheduler's configuration says.

    ``solver`` and ``options`` are those of ``tstitch_trt.solvers``. ``spacing`` is not repeated in the options, and
    ``places`` says whether this class places its steps by it; if not, it is for other solvers that a bundle is run
    with. ``as_written``: options on top, with which the table follows diffusers also where its code departs from the
    sampler as published.
    """

    solver: str
    options: Mapping[str, Option]
    spacing: str
    places: bool
    as_written: Mapping[str, Option]
    noise: NoiseScheduleSpec
    parametrisation: PredictionType


_Read = tuple[str, dict[str, Option], dict[str, Option]]
"""A solver's name, its options, and ``Scheduler.as_written``."""

_BETAS: Final = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "squared-cosine"}
_PREDICTIONS: Final = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SPACINGS: Final = ("leading", "linspace", "trailing")
_FINALS: Final = {"zero": "zero", "sigma_min": "sigma-min"}
_VARIANCES: Final = {
    "fixed_small": "fixed-small",
    "fixed_small_log": "fixed-small",  # the same deviation, by way of its logarithm
    "fixed_large": "fixed-large",
    "learned_range": "learned",
}


# What follows from the model's training, so that no other scheduler helps
_OF_TRAINING: Final = frozenset(
    ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "prediction_type", "trained_betas",
     "rescale_betas_zero_snr")
)  # fmt: skip
# Parts of the names of classes that have keys for betas, or inherit them, and other noise
_OTHER_NOISE: Final = ("CogVideoX", "EDM", "FlowMatch", "IPNDM", "UnCLIP")
# The classes that do not read ``rescale_betas_zero_snr``, and may carry it along from a configuration of another.
_NOT_RESCALING: Final = frozenset(
    f"{name}Scheduler"
    for name in ("DEISMultistep", "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "HeunDiscrete",
                 "IPNDM", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "RePaint", "SASolver",
                 "UnCLIP")
)  # fmt: skip


_CLIPS: Final = "a step here is linear in the model's output"
_WHY_OFF: Final[Mapping[str, str]] = {
    "thresholding": _CLIPS,
    "clip_sample": _CLIPS,
    "use_beta_sigmas": "no spacing here follows a beta distribution",
    "use_flow_sigmas": "flow matching is not supported",
}


class _Config:
    """The keys of one configuration, with the defaults of its class."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self.name = str(values.get("_class_name"))

    def get(self, key: str, default: Any) -> Any:
        """The value of ``key``. diffusers writes ``null`` for an absent switch."""
        value = self._values.get(key, default)
        return default if value is None else value

    def refuse(self, key: str, value: Any, allowed: str, hint: str | None = None) -> BadInput:
        stated = "" if key in self._values else f" (the default of {self.name})"
        shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:97]}..."
        if key in _OF_TRAINING:
            usual = f"correct {key} if the model was trained otherwise; other noise and predictions are not supported"
        else:
            change = "" if key == "_class_name" else f"change {key}, or "
            usual = f"{change}take a scheduler of another class; read are {', '.join(SCHEDULERS)}"
        return BadInput(f"{self._where}: {key} is {shown}{stated}; allowed is {allowed}", hint=hint or usual)

    def off(self, *keys: str, default: bool = False) -> None:
        for key in keys:
            if self.switch(key, default=default):
                raise self.refuse(key, True, f"false: {_WHY_OFF[key]}")

    def only(self, key: str, default: Any, wanted: Any) -> None:
        if self.get(key, default) != wanted:
            raise self.refuse(key, self.get(key, default), repr(wanted))

    def choose(self, key: str, default: str, choices: Mapping[str, str]) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refuse(key, value, " or ".join(repr(choice) for choice in choices))
        return choices[value]

    def whole(self, key: str, default: int, *, least: int = 0, most: int = 100_000) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float, *, above: float, below: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
            raise self.refuse(key, value, f"a number above {above:g} and below {below:g}")
        return float(value)

    def switch(self, key: str, *, default: bool) -> bool:
        """``null`` is off, whatever the default."""
        value = self._values.get(key, default)
        value = False if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value


def read_scheduler(config: Mapping[str, Any], *, where: str = "scheduler_config.json") -> Scheduler:
    """The scheduler that ``config`` (with ``_class_name``) describes; ``where`` names it in errors.

    Raises ``BadInput`` naming the key that can't be honoured, or ``UnknownName`` for a class that is not known.
    """
    keys = _Config(config, where)
    if keys.name not in SCHEDULERS:
        raise unknown_name("scheduler class", keys.name, SCHEDULERS, hint=f"(in {where})")
    noise, prediction = _training(keys)
    spacing = "linspace"
    if keys.name != "DPMSolverSinglestepScheduler":  # which has no such key
        spacing = keys.choose(
            "timestep_spacing",
            "leading" if keys.name in _LEADING_CLASSES else "linspace",
            {name: name for name in _SPACINGS},
        )
    solver, options, as_written = SCHEDULERS[keys.name](keys, spacing)
    places = solver not in ("lcm", "tcd") and ("sigmas" not in options or "sigma_ends" in options)
    if places and spacing == "leading" and (offset := keys.whole("steps_offset", 0)):
        options["steps_offset"] = offset
    return Scheduler(
        solver=solver,
        options=options,
        spacing=spacing,
        places=places,
        as_written=as_written,
        noise=noise,
        parametrisation=prediction,
    )


def read_training(config: Mapping[str, Any], *, where: str) -> tuple[NoiseScheduleSpec, PredictionType]:
    """The noise a model was trained with and what it predicts, for any scheduler class with betas.

    Raises ``BadInput`` naming the key that can't be honoured.
    """
    keys = _Config(config, where)
    stated = any(config.get(key) is not None for key in ("beta_schedule", "beta_start", "beta_end", "trained_betas"))
    if any(word in keys.name for word in _OTHER_NOISE) or not (stated or keys.name in SCHEDULERS):
        raise keys.refuse("_class_name", keys.name, "a class whose noise is that of its betas")
    return _training(keys)


def _training(keys: _Config) -> tuple[NoiseScheduleSpec, PredictionType]:
    steps = keys.whole("num_train_timesteps", 1000, least=1)
    zero = keys.name not in _NOT_RESCALING and keys.switch("rescale_betas_zero_snr", default=False)
    prediction: PredictionType = keys.choose("prediction_type", "epsilon", _PREDICTIONS)  # type: ignore[assignment]
    if betas := _given_betas(keys, steps):
        return NoiseScheduleSpec(kind="betas", betas=betas, steps=steps, zero_terminal_snr=zero), prediction
    latent = keys.name in ("LCMScheduler", "TCDScheduler")  # whose defaults are those of latent diffusion
    kind = keys.choose("beta_schedule", "scaled_linear" if latent else "linear", _BETAS)
    ends: dict[str, float] = {}
    if kind != "squared-cosine":  # whose betas are no range
        start = keys.number("beta_start", 0.00085 if latent else 0.0001, above=0, below=1)
        end = keys.number("beta_end", 0.012 if latent else 0.02, above=math.nextafter(start, 0), below=1)
        ends = {"beta_start": start, "beta_end": end}
    noise = NoiseScheduleSpec(kind=kind, steps=steps, zero_terminal_snr=zero, **ends)  # type: ignore[arg-type]
    return noise, prediction


def _given_betas(keys: _Config, steps: int) -> tuple[float, ...]:
    """``trained_betas``, which go before any formula; empty where there are none."""
    betas = keys.get("trained_betas", None)
    if betas is None:
        return ()
    betas = betas.tolist() if hasattr(betas, "tolist") else betas
    if not isinstance(betas, list | tuple) or len(betas) != steps:
        raise keys.refuse("trained_betas", betas, f"null or a list of num_train_timesteps = {steps} numbers")
    if any(isinstance(beta, bool) or not isinstance(beta, float) or not 0 < beta < 1 for beta in betas):
        raise keys.refuse("trained_betas", betas, "null or numbers above 0 and below 1")
    return tuple(betas)


def _final_alpha(keys: _Config, *, default: bool) -> str:
    return "zero" if keys.switch("set_alpha_to_one", default=default) else "sigma-min"


def _ddim(keys: _Config, spacing: str) -> _Read:
    keys.off("thresholding")
    keys.off("clip_sample", default=True)
    options: dict[str, Option] = {"final": _final_alpha(keys, default=True)}
    if spacing != "leading":
        options["step_to"] = "stride"
    return "ddim", options, {"step_to": "stride"}  # with "leading" it differs where steps_offset reaches a stride


def _ddpm(keys: _Config, spacing: str) -> _Read:
    keys.off("thresholding")
    keys.off("clip_sample", default=True)
    variance = keys.choose("variance_type", "fixed_small", _VARIANCES)
    return "ddpm", {"variance": variance}, {} if variance == "fixed-small" else {"last_noise": True}


def _pndm(keys: _Config, spacing: str) -> _Read:
    if not keys.switch("skip_prk_steps", default=False):
        raise keys.refuse("skip_prk_steps", False, "True")
    options: dict[str, Option] = {"final": _final_alpha(keys, default=False)}
    if keys.get("prediction_type", "epsilon") == "v_prediction":
        options["remember"] = "v"
    if spacing != "leading":
        options["step_to"] = "stride"
    return "pndm", options, {"restart": "repeat", "step_to": "stride"}


def _euler(keys: _Config, spacing: str) -> _Read:
    keys.off("use_beta_sigmas")
    keys.only("interpolation_type", "linear", "linear")
    if keys.get("prediction_type", "epsilon") == "v_prediction":  # alone with the other
        keys.only("timestep_type", "discrete", "discrete")
    options: dict[str, Option] = {"final": keys.choose("final_sigmas_type", "zero", _FINALS)}
    options |= _sigmas(keys)
    if "sigmas" in options and spacing != "linspace":  # linspace reaches the ends of the noise schedule
        options["sigma_ends"] = "spacing"
    return "euler", options, {}


def _dpm(keys: _Config, spacing: str) -> _Read:
    keys.off("thresholding", "use_flow_sigmas")
    kind = keys.choose("algorithm_type", "dpmsolver++", {"dpmsolver++": "", "deis": "", "sde-dpmsolver++": "-sde"})
    order, options = _order_and_final(keys)
    if order > 1:
        if not keys.switch("lower_order_final", default=True):
            options["lower_order_final"] = False
        if options["final"] != "zero" and keys.switch("euler_at_final", default=False):
            options["euler_at_final"] = True
    options |= _sigmas(keys, lambdas=True)
    if "sigmas" in options:
        cosine = keys.get("beta_schedule", "linear") == "squaredcos_cap_v2"
        rounds = options["sigmas"] == "karras" or _lambdas(keys)
        options["sigma_timesteps"] = "nearest" if rounds and not cosine else "down"
    else:
        options |= _clipped(keys)
    return f"dpmpp-{order}{'m' if order > 1 else ''}{kind}", options, {}


def _order_and_final(keys: _Config) -> tuple[int, dict[str, Option]]:
    """Of both DPM-Solver++. For steps of order 2 diffusers falls back on midpoint for the three of other classes."""
    order = keys.whole("solver_order", 2, least=1, most=3)
    options: dict[str, Option] = {"final": keys.choose("final_sigmas_type", "zero", _FINALS)}
    if order > 1:
        second = keys.choose(
            "solver_type",
            "midpoint",
            {"midpoint": "midpoint", "heun": "heun"} | dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
        )
        options |= {} if second == "midpoint" else {"second_order": second}
    return order, options


def _clipped(keys: _Config) -> dict[str, Option]:
    """Where no sigmas place the steps."""
    keys.off("use_beta_sigmas")
    if keys.get("lambda_min_clipped", -math.inf) == -math.inf:
        return {}
    return {"lambda_min": keys.number("lambda_min_clipped", -math.inf, above=-1e9, below=1e9)}


def _singlestep(keys: _Config, spacing: str) -> _Read:
    """The class has no timestep_spacing: its timesteps are those of linspace."""
    keys.off("thresholding", "use_flow_sigmas")
    keys.choose("algorithm_type", "dpmsolver++", {"dpmsolver++": "", "deis": ""})
    order, options = _order_and_final(keys)
    if order > 1 and options["final"] != "zero" and not keys.switch("lower_order_final", default=False):
        options["lower_order_final"] = False
    options |= _sigmas(keys)
    if "sigmas" in options:
        options["sigma_timesteps"] = "nearest" if options["sigmas"] == "karras" else "down"
    else:
        options |= _clipped(keys)
    return f"dpmpp-{order}{'s' if order > 1 else ''}", options, {}


def _unipc(keys: _Config, spacing: str) -> _Read:
    keys.off("thresholding", "use_flow_sigmas")
    if not keys.switch("predict_x0", default=True):
        raise keys.refuse("predict_x0", False, "True")
    keys.only("solver_p", None, None)
    order = keys.whole("solver_order", 2, least=1, most=3)
    # diffusers falls back on bh2 for the three that other classes have
    formula = keys.choose(
        "solver_type", "bh2", {"bh1": "bh1", "bh2": "bh2"} | dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")
    )
    options: dict[str, Option] = {"order": order, "final": keys.choose("final_sigmas_type", "zero", _FINALS)}
    if formula != "bh2":
        options["formula"] = formula
    if order > 1 and not keys.switch("lower_order_final", default=True):
        options["lower_order_final"] = False
    if steps := keys.get("disable_corrector", []):
        if not isinstance(steps, list) or len(steps) > 1000 or any(type(step) is not int for step in steps):
            raise keys.refuse("disable_corrector", steps, "a list of steps")
        options["uncorrected"] = ",".join(str(step) for step in steps if step >= 0)
    options |= _sigmas(keys)
    if "sigmas" in options:
        options["sigma_timesteps"] = "nearest" if options["sigmas"] == "karras" else "down"
        if options["final"] == "sigma-min":  # of its own steps, not of the noise schedule
            options["final"] = "last"
    else:
        keys.off("use_beta_sigmas")
    return "unipc", options, {}


def _lcm(keys: _Config, spacing: str) -> _Read:
    keys.off("thresholding", "clip_sample")
    options: dict[str, Option] = {"original_steps": keys.whole("original_inference_steps", 50, least=1)}
    if (scaling := keys.number("timestep_scaling", 10.0, above=0, below=1e9)) != 10:
        options["timestep_scaling"] = scaling
    return "lcm", options, {}


def _tcd(keys: _Config, spacing: str) -> _Read:
    """The class has keys for clipping and reads none of them."""
    return "tcd", {"original_steps": keys.whole("original_inference_steps", 50, least=1)}, {}


def _lambdas(keys: _Config) -> bool:
    """Whether the steps lie at equal distances of log sigma, from end to end of the noise schedule."""
    lambdas, karras = (keys.switch(key, default=False) for key in ("use_lu_lambdas", "use_karras_sigmas"))
    return lambdas and not karras


def _sigmas(keys: _Config, *, lambdas: bool = False) -> dict[str, Option]:
    """``lambdas``: the class reads ``use_lu_lambdas``."""
    on = [key for key in _SIGMAS if keys.switch(key, default=False)]
    if len(on) > 1:
        raise keys.refuse(on[1], True, f"false beside {on[0]}")
    if lambdas and _lambdas(keys):
        return {"sigmas": "exponential"}
    if not on or on == ["use_beta_sigmas"]:
        return {}
    options: dict[str, Option] = {"sigmas": "karras" if on == ["use_karras_sigmas"] else "exponential"}
    for name in ("sigma_min", "sigma_max"):
        if keys.get(name, None) is not None:
            options[name] = keys.number(name, 0.0, above=0, below=1e6)
    return options


_SIGMAS: Final = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_LEADING_CLASSES: Final = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "LCMScheduler", "PNDMScheduler",
)  # fmt: skip
SCHEDULERS: Final[Mapping[str, Callable[[_Config, str], _Read]]] = {
    "DDIMParallelScheduler": _ddim,
    "DDIMScheduler": _ddim,
    "DDPMParallelScheduler": _ddpm,
    "DDPMScheduler": _ddpm,
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _singlestep,
    "EulerAncestralDiscreteScheduler": lambda keys, spacing: ("euler-ancestral", {}, {}),
    "EulerDiscreteScheduler": _euler,
    "LCMScheduler": _lcm,
    "PNDMScheduler": _pndm,
    "TCDScheduler": _tcd,
    "UniPCMultistepScheduler": _unipc,
}
