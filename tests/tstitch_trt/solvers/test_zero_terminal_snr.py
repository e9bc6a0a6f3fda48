"""Zero terminal SNR (arXiv 2305.08891, algorithm 1): the last timestep has no signal. diffusers' own schedulers, with
``rescale_betas_zero_snr`` on and untouched, are the oracle."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from support.diffusers_trajectory import compare
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.bundle.scheduler_config import read_scheduler, read_training
from tstitch_engines.errors import BadInput
from tstitch_trt.solvers import SOLVERS, make_table
from tstitch_trt.solvers.noise_schedule import NoiseSchedule
from tstitch_trt.solvers.prediction import coefficients

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# diffusers calls np.array on tensors, which NumPy 2 wants spelled otherwise
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SPECS = {  # diffusers' beta_schedule -> ours
    "linear": NoiseScheduleSpec(kind="linear", zero_terminal_snr=True),
    "scaled_linear": NoiseScheduleSpec(
        kind="scaled-linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True
    ),
    "squaredcos_cap_v2": NoiseScheduleSpec(kind="squared-cosine", zero_terminal_snr=True),
}
KINDS = {"v": "v_prediction", "x0": "sample"}
CLASSES: dict[str, dict[str, Any]] = {
    "DDIM": {"clip_sample": False},
    "DDPM": {"clip_sample": False},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "DPMSolverMultistep": {},
    "UniPCMultistep": {},
}
SPACINGS = ("leading", "linspace", "trailing")


def scheduler_of(name: str, schedule: str, kind: str, *, exact: bool = True, **config: Any) -> Any:
    """``exact``: it is handed our alphas, which differ by the rounding of its float32 betas."""
    spec = SPECS[schedule]
    betas = {"beta_schedule": schedule, "beta_start": spec.beta_start, "beta_end": spec.beta_end}
    made = getattr(diffusers, f"{name}Scheduler")
    scheduler = made(**betas, prediction_type=KINDS[kind], rescale_betas_zero_snr=True, **config)
    if exact:
        ours, theirs = NoiseSchedule.from_spec(spec).alphas_cumprod, scheduler.alphas_cumprod
        scheduler.alphas_cumprod = torch.from_numpy(np.append(ours[:-1], float(theirs[-1])))
    return scheduler


def check(scheduler: Any, steps: int, kind: str, *, relative: float = 1e-4, **how: Any) -> None:
    """The table of what its configuration says against the scheduler itself."""
    found = read_scheduler(scheduler.config | {"_class_name": type(scheduler).__name__})
    assert found.noise.zero_terminal_snr
    assert found.parametrisation == kind
    options = dict(found.options)
    if found.places:
        options["spacing"] = found.spacing
    scheduler.set_timesteps(steps)
    table = make_table(found.solver, NoiseSchedule.from_spec(found.noise), steps, **options)
    compare(table, scheduler, kind, relative=relative, **how)


@pytest.mark.parametrize("schedule", SPECS)
def test_the_schedule_is_that_of_diffusers(schedule: str) -> None:
    ours = NoiseSchedule.from_spec(SPECS[schedule])
    theirs = scheduler_of("DDIM", schedule, "v", exact=False).alphas_cumprod.numpy()
    assert ours.alphas_cumprod[-1] == theirs[-1] == 0.0
    assert ours.sigmas[-1] == np.inf
    np.testing.assert_allclose(ours.alphas_cumprod, theirs, rtol=1e-4, atol=1e-7)  # float32 betas there
    clipped = scheduler_of("EulerDiscrete", schedule, "v", exact=False).alphas_cumprod.numpy()
    assert ours.with_signal().alphas_cumprod[-1] == clipped[-1] == 2**-24
    plain = NoiseSchedule.from_spec(NoiseScheduleSpec(kind="linear"))
    assert plain.with_signal() is plain


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("schedule", SPECS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_and_spacing(name: str, schedule: str, spacing: str, kind: str) -> None:
    if name == "EulerAncestralDiscrete" and kind == "x0":
        kind = "v"  # diffusers has no prediction of the picture here
    check(scheduler_of(name, schedule, kind, timestep_spacing=spacing, **CLASSES[name]), 12, kind)


@pytest.mark.parametrize("name", [*CLASSES, "LCM", "TCD"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_as_shipped(name: str, steps: int) -> None:
    config = {} if name in ("LCM", "TCD") else {**CLASSES[name], "timestep_spacing": "trailing"}
    check(
        scheduler_of(name, "scaled_linear", "v", exact=False, **config),
        steps,
        "v",
        relative=3e-4,
        **({"eta": 0.0} if name == "TCD" else {}),
    )


@pytest.mark.parametrize("schedule", SPECS)
@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_sigma_spacings_begin_at_sigma_4096(schedule: str, sigmas: str, name: str) -> None:
    scheduler = scheduler_of(name, schedule, "v", timestep_spacing="trailing", **{f"use_{sigmas}_sigmas": True})
    check(scheduler, 12, "v")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistep", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistep", {"solver_order": 3}),
        ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}),
        ("DDPM", {"clip_sample": False, "variance_type": "fixed_large"}),
    ],
)
def test_options_of_the_classes(name: str, config: dict[str, Any]) -> None:
    scheduler = scheduler_of(name, "scaled_linear", "v", **{"timestep_spacing": "trailing", **config})
    check(scheduler, 20, "v", silent_end="variance_type" in config)  # diffusers draws noise in its last step


def test_ddim_by_strides_and_with_noise() -> None:
    scheduler = scheduler_of("DDIM", "scaled_linear", "v", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(7)
    noise = NoiseSchedule.from_spec(SPECS["scaled_linear"])
    table = make_table("ddim", noise, 7, spacing="trailing", step_to="stride", eta=0.5)
    compare(table, scheduler, "v", eta=0.5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SPECS)
def test_every_solver_begins_at_the_last_timestep(solver: str, schedule: str) -> None:
    noise = NoiseSchedule.from_spec(SPECS[schedule])
    placed = SOLVERS[solver].timesteps is None
    table = make_table(solver, noise, 10, **({"spacing": "trailing"} if placed else {}))
    assert table.t[0] == 999
    assert table.a[0] == 0 if SOLVERS[solver].from_zero_signal else table.sigma[0] == pytest.approx(4096, rel=1e-6)
    karras = {"sigmas": "karras"} if placed else {}
    assert np.isfinite(make_table(solver, noise, 10, **karras).c_in).all()


def test_no_prediction_of_the_noise_where_there_is_no_signal() -> None:
    with pytest.raises(BadInput, match=r"eps\) says nothing of the clean latent where there is no signal"):
        coefficients("eps", [0.0, 0.5], [1.0, 0.8])
    p, q = coefficients("v", [0.0], [1.0])
    assert (p.item(), q.item()) == (0.0, -1.0)


def test_levels_that_do_not_fall_are_refused() -> None:
    """``linear`` leaves less signal than 2**-24 at its last timesteps but one."""
    noise = NoiseSchedule.from_spec(SPECS["linear"])
    with pytest.raises(BadInput, match=r"the noise does not fall from timestep 999 to 998: .*'euler'"):
        make_table("euler", noise, timesteps=[999, 998, 500])
    with pytest.raises(BadInput, match=r"the noise does not fall from timestep 999 to 998\.5"):
        make_table("ddim", noise, timesteps=[999, 998.5, 500])
    make_table("ddim", noise, timesteps=[999, 998, 500])


def test_one_timestep_can_not_be_without_signal() -> None:
    with pytest.raises(BadInput, match="has no signal anywhere"):
        NoiseSchedule.from_spec(NoiseScheduleSpec(kind="linear", steps=1, zero_terminal_snr=True))


def test_classes_that_do_not_rescale_carry_the_key_along() -> None:
    tried = 0
    for name in dir(diffusers.schedulers):
        parameters = getattr(getattr(diffusers.schedulers, name), "__init__", None)
        known = inspect.signature(parameters).parameters if parameters is not None and "Scheduler" in name else {}
        if "beta_start" in known and not name.startswith(("CogVideoX", "Flax")):
            noise, _ = read_training({"_class_name": name, "beta_end": 0.02, "rescale_betas_zero_snr": True}, where="x")
            assert noise.zero_terminal_snr == ("rescale_betas_zero_snr" in known), name
            tried += 1
    assert tried > 10
    stated = {"beta_end": 0.02, "rescale_betas_zero_snr": True}
    assert read_training(stated, where="x")[0].zero_terminal_snr  # by whatever class
    with pytest.raises(BadInput, match="rescale_betas_zero_snr is 'yes'; allowed is true or false"):
        read_scheduler({"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": "yes"})
