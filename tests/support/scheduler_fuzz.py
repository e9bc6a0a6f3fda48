"""Random configurations of diffusers' schedulers, and their trajectories beside those of our plans."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from support.diffusers_trajectory import in_float64, run_theirs
from support.manifests import manifest, member
from support.reference import walk
from tstitch_engines.bundle.scheduler_config import SCHEDULERS
from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.scheduler import AskedSteps, check_plan, more_noise, plan_keywords, read_own
from tstitch_trt.plan.plan import make_plan

__all__ = ["BENIGN", "Case", "Outcome", "changed_by", "draw_case", "named_key", "otherwise", "run"]

Array = NDArray[np.float64]

SHAPE = (1, 3, 2, 2)

# Every key of the classes that are read, with the choices that diffusers documents.
VALUES: Mapping[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 1000, 250, 100),
    "beta_start": (0.0001, 0.00085, 0.001),
    "beta_end": (0.012, 0.02),
    "beta_schedule": ("linear", "scaled_linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "epsilon", "v_prediction", "sample"),
    "dynamic_thresholding_ratio": (0.995, 0.9),
    "sample_max_value": (1.0, 2.0),
    "clip_sample_range": (1.0, 3.0),
    "set_alpha_to_one": (True, False, None),
    "steps_offset": (0, 1, 1, 3),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "use_karras_sigmas": (True, False),
    "use_exponential_sigmas": (True, False, False),
    "use_lu_lambdas": (True, False),
    "sigma_min": (None, 0.06),
    "sigma_max": (None, 9.0),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": (1, 2, 3),
    "lower_order_final": (True, False, None),
    "euler_at_final": (True, False),
    "lambda_min_clipped": (-math.inf, -5.1, -2.0),
    "flow_shift": (1.0, 3.0),
    "time_shift_type": ("exponential",),
    "disable_corrector": ([], [0], [1, 2], [40]),
    "solver_p": (None,),
    "shift_terminal": (None,),
    "original_inference_steps": (50, 25, 40),
    "timestep_scaling": (10.0, 5.0),
    "trained_betas": (None, None, None, "rising"),
    "rescale_betas_zero_snr": (True, False, False),
}
# Those of which some values are refused, which are drawn less often.
RARE: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("sigmoid", "laplace"),
    "prediction_type": ("flow_prediction",),
    "thresholding": (True,),
    "clip_sample": (True, None),
    "skip_prk_steps": (False,),
    "variance_type": ("fixed_large_log", "learned"),
    "interpolation_type": ("log_linear",),
    "timestep_type": ("continuous",),
    "use_beta_sigmas": (True,),
    "use_flow_sigmas": (True,),
    "use_dynamic_shifting": (True,),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver"),
    "predict_x0": (False, None),
    "steps_offset": (40,),
}
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", None)
# What a refused key may be set to, where its class's default is refused.
BENIGN: Mapping[str, Any] = {"clip_sample": False, "skip_prk_steps": True}


@dataclass(frozen=True)
class Case:
    """A configuration with ``_class_name``, and how a pipeline is called. ``strength``: from a picture."""

    config: Mapping[str, Any]
    steps: int | None
    timesteps: tuple[float, ...] | None
    strength: float | None
    eta: float

    def __str__(self) -> str:
        call = {key: value for key, value in vars(self).items() if key != "config" and value not in (None, 0)}
        config = {key: value for key, value in self.config.items() if key != "trained_betas" or value is None}
        return f"{config} {call}"


@dataclass(frozen=True)
class Outcome:
    """``error``: relative, the largest of all steps. ``message`` of a refusal, or why diffusers has no picture."""

    kind: Literal["equal", "differs", "refused", "theirs fails"]
    error: float = 0.0
    message: str = ""


def draw_case(seed: int) -> Case:
    import diffusers

    rng = np.random.default_rng(seed)

    def pick(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    name = pick(sorted(SCHEDULERS))
    own = [key for key in inspect.signature(getattr(diffusers, name).__init__).parameters if key != "self"]
    config: dict[str, Any] = {"_class_name": name, "clip_sample": False, "skip_prk_steps": True}
    for key in sorted({*VALUES, *RARE, "variance_type"}):
        mine = key in own
        if key in VALUES and rng.random() < (0.4 if mine else 0.15):
            config[key] = pick(VALUES[key])
        if key in RARE and rng.random() < (0.03 if mine else 0.1):
            config[key] = pick(RARE[key])
    if rng.random() < 0.7:
        config["variance_type"] = pick(VARIANCES)
    if "DDPM" not in name and rng.random() < 0.8:
        config.pop("variance_type", None)
    train = config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") == "rising":
        config["trained_betas"] = np.linspace(0.0005, 0.03, train).tolist()
    steps: int | None = int(pick((1, 2, 3, 4, 5, 8, 10, 14, 15, 20, 25, 30, 48, 50, 61, 100)))
    timesteps = None
    if rng.random() < (0.25 if name.startswith(("DDPM", "Euler", "DPM", "LCM", "TCD")) else 0.03):
        count = int(rng.integers(1, 12))
        whole = np.sort(rng.choice(train, min(count, train), replace=False))[::-1].astype(float)
        whole = whole + (0.4 * (whole < train - 1) if rng.random() < 0.2 else 0)
        steps, timesteps = None, tuple(whole.tolist())
    strength = float(pick((0.3, 0.5, 0.75, 1.0))) if rng.random() < 0.35 else None
    eta = float(pick((0.0, 0.5, 1.0))) if name.startswith(("DDIM", "TCD")) or rng.random() < 0.03 else 0.0
    return Case(config, steps, timesteps, strength, eta)


def fake_model(sample: Array, t: float) -> Array:
    """Elementwise, and nonlinear in the latent and in time."""
    return np.asarray(1.4 * np.tanh(0.9 * sample + np.sin(t / 130)) + 0.4 * np.cos(t / 77) * sample + 0.1)


def run(case: Case, *, shipped: bool = False) -> Outcome:
    """Both trajectories, from the same latent with the same noise; diffusers' in float64, or ``shipped``: as it is."""
    import diffusers

    cls = getattr(diffusers, case.config["_class_name"])
    with nullcontext() if shipped else in_float64(cls):
        try:
            scheduler = cls.from_config(dict(case.config))
        except Exception as error:
            return Outcome("theirs fails", message=str(error))
        try:
            ours, start = _ours(scheduler, case)
        except BadInput as error:
            return Outcome("refused", message=str(error))
        try:
            theirs = _theirs(scheduler, case, start)
        except Exception as error:
            return Outcome("theirs fails", message=f"{type(error).__name__}: {error}")
    if not np.isfinite(theirs).all():
        return Outcome("theirs fails", message="not finite")
    if theirs.shape != ours.shape:
        return Outcome("differs", math.inf, f"{len(theirs)} states instead of {len(ours)}")
    axes = tuple(range(1, ours.ndim))
    error = float((np.abs(ours - theirs).max(axes) / np.abs(theirs).max(axes)).max())
    return Outcome("equal" if error <= (1e-3 if shipped else 1e-4) else "differs", error)


def changed_by(case: Case, key: str, value: Any) -> bool:
    """Whether diffusers draws something else without ``key`` (with ``value``, if that is not ``None``)."""
    import diffusers

    cls = getattr(diffusers, case.config["_class_name"])
    found = []
    for config in (case.config, without(case.config, key, value)):
        with in_float64(cls):
            try:
                found.append(_theirs(cls.from_config(dict(config)), case, 0, size=10.0))  # beyond what is clipped
            except Exception:
                return True
    if found[0].shape != found[1].shape or not all(np.isfinite(each).all() for each in found):
        return True
    return bool(np.abs(found[0] - found[1]).max() > 1e-9 * np.abs(found[1]).max())


def without(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    left = {name: given for name, given in config.items() if name != key}
    return left if value is None else {**left, key: value}


def _asked(case: Case) -> AskedSteps:
    return AskedSteps(steps=case.steps, timesteps=case.timesteps, eta=case.eta)


def _start(case: Case) -> int:
    steps = case.steps if case.timesteps is None else len(case.timesteps)
    assert steps is not None
    if case.strength is None:
        return 0
    return steps - max(1, min(int(steps * case.strength), steps))


def _ours(scheduler: Any, case: Case) -> tuple[Array, int]:
    read, asked = read_own(scheduler), _asked(case)
    learned = _learned(scheduler)
    bundle = manifest(
        {"large": member(parametrisation=read.parametrisation, learned=learned, channels=SHAPE[1])}, noise=read.noise
    )
    start = _start(case)
    plan = make_plan(bundle, **plan_keywords(scheduler, asked), schedule="large", start=start)
    check_plan(scheduler, asked, plan)
    clean, unit, noise = _noise(plan.steps)
    if case.strength is None:
        x = unit * plan.init_scale * float(more_noise(scheduler, asked, plan))
    else:
        x = plan.table.a[start] * clean + plan.table.s[start] * unit
    found = walk(plan.rows[start:], x, lambda sample, t, step: _output(sample, t, learned), noise[start:])
    return found, start


def _theirs(scheduler: Any, case: Case, start: int, size: float = 1.0) -> Array:
    import torch

    learned = _learned(scheduler)
    given: dict[str, Any] = {"num_inference_steps": case.steps}
    if case.timesteps is not None:
        given = {"timesteps": list(case.timesteps)}
    scheduler.set_timesteps(**given)
    clean, unit, noise = (size * each for each in _noise(len(scheduler.timesteps)))
    if case.strength is None:
        x = unit * float(scheduler.init_noise_sigma)
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        at = scheduler.timesteps[start : start + 1]
        x = scheduler.add_noise(torch.from_numpy(clean), torch.from_numpy(unit), at).numpy()
    options = {"eta": case.eta} if "eta" in inspect.signature(scheduler.step).parameters else {}

    def model(sample: Array, t: float, step: int) -> Array:
        return _output(sample, t, learned)

    return run_theirs(scheduler, model, x, noise, start=start, **options)


def _learned(scheduler: Any) -> bool:
    return "DDPM" in type(scheduler).__name__ and scheduler.config.variance_type in ("learned", "learned_range")


def _output(sample: Array, t: float, learned: bool) -> Array:
    found = fake_model(sample, t)
    return np.concatenate([found, np.tanh(sample + t / 500)], axis=1) if learned else found


def _noise(steps: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(5)
    return rng.normal(size=SHAPE), rng.normal(size=SHAPE), rng.normal(size=(steps, *SHAPE))


def named_key(message: str) -> str | None:
    """The key of the configuration that a refusal of reading it names."""
    found = re.match(r"the pipeline's scheduler: (\w+) is ", message)
    return None if found is None else found[1]


def otherwise(case: Case, message: str) -> Case:
    """``case`` with what a refusal names left out or set to what it allows."""
    key = named_key(message)
    found = next((key for pattern, key in _NAMED.items() if re.match(pattern, message)), key)
    assert found is not None, f"{message} names nothing of {case}"
    changes: dict[str, Any] = {"config": without(case.config, found, BENIGN.get(found))}
    if found == "eta":
        changes = {"eta": 0.0}
    if found in ("steps", "timesteps"):
        changes = {"timesteps": None, "steps": 10}
    return replace(case, **changes)


_NAMED: Mapping[str, str] = {
    "eta is ": "eta",
    "timesteps was given": "timesteps",
    r"\w+ can't place its steps by timesteps": "timesteps",
    r".* `mu` must be passed when `use_dynamic_shifting`": "use_dynamic_shifting",
    r"\w+ can't place its steps by num_inference_steps": "steps",
    "num_inference_steps is ": "steps",
    "'pndm' evaluates ": "steps",
    r"\d+ steps of spacing": "steps",
    "the noise does not fall from timestep": "timesteps",
    "timesteps must fall": "timesteps",
    "steps_offset ": "steps_offset",
    "sigma_max is ": "sigma_max",
    "sigma_min is ": "sigma_min",
    "lambda_min is ": "lambda_min_clipped",
    r"member 'large' predicts the noise \(eps\), which says nothing": "rescale_betas_zero_snr",
}
