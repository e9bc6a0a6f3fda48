"""Every solver against diffusers' scheduler of the same name: same spacing, same noise, the whole trajectory.

diffusers rounds its betas to float32, which leaves ``1 - alphas_cumprod[0]`` of the squared-cosine schedule three
digits and an error of 3e-4 in the last step; so its schedulers are handed the same alphas in float64 here, and
``test_as_shipped`` leaves them alone. Its Euler and DPM-Solver still keep sigmas and latents in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.diffusers_trajectory import RELATIVE, compare
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_trt.solvers import make_table
from tstitch_trt.solvers.noise_schedule import NoiseSchedule

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

SCHEDULES = {  # our kind -> (spec, diffusers' beta_schedule)
    "linear": (NoiseScheduleSpec(kind="linear"), "linear"),
    "scaled-linear": (NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012), "scaled_linear"),
    "squared-cosine": (NoiseScheduleSpec(kind="squared-cosine"), "squaredcos_cap_v2"),
}
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
STEPS = (10, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")

# diffusers calls np.array on tensors, which NumPy 2 wants spelled otherwise
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
DPM: dict[str, dict[str, Any]] = {  # our solver -> diffusers' DPMSolverMultistepScheduler
    "dpmpp-2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp-2m-sde": {**SDE, "solver_order": 2},
    "dpmpp-3m": {"algorithm_type": "dpmsolver++", "solver_order": 3},
    "dpmpp-3m-sde": {**SDE, "solver_order": 3},
}


def noise_of(schedule: str) -> NoiseSchedule:
    return NoiseSchedule.from_spec(SCHEDULES[schedule][0])


def scheduler_of(name: str, schedule: str, kind: str, *, exact: bool = True, **config: Any) -> Any:
    import diffusers

    spec, theirs = SCHEDULES[schedule]
    betas = {"beta_schedule": theirs, "beta_start": spec.beta_start, "beta_end": spec.beta_end}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**betas, prediction_type=KINDS[kind], **config)
    if exact:
        scheduler.alphas_cumprod = torch.from_numpy(noise_of(schedule).alphas_cumprod.copy())
        if config.get("set_alpha_to_one") is False:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


every_case = [
    pytest.mark.parametrize("schedule", SCHEDULES),
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.parametrize("steps", STEPS),
]


def cases(function: Any) -> Any:
    for mark in every_case:
        function = mark(function)
    return function


@cases
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(schedule: str, kind: str, steps: int, spacing: str, eta: float) -> None:
    scheduler = scheduler_of("DDIM", schedule, kind, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    compare(make_table("ddim", noise_of(schedule), steps, spacing=spacing, eta=eta), scheduler, kind, eta=eta)


@cases
def test_ddim_as_stable_diffusion_configures_it(schedule: str, kind: str, steps: int) -> None:
    scheduler = scheduler_of("DDIM", schedule, kind, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    table = make_table("ddim", noise_of(schedule), steps, spacing="leading", steps_offset=1, final="sigma-min")
    compare(table, scheduler, kind)


@cases
@pytest.mark.parametrize("spacing", ["linspace", "dit"])
def test_ddim_steps_to_the_next_timestep_of_its_list(schedule: str, kind: str, steps: int, spacing: str) -> None:
    """diffusers' DDIM steps to t - T // N, which is not on a linspace list. DDIM is DPM-Solver++ of order 1
    (arXiv 2211.01095, section 4.1), whose scheduler takes any list."""
    table = make_table("ddim", noise_of(schedule), steps, spacing=spacing)
    scheduler = scheduler_of("DPMSolverMultistep", schedule, kind, algorithm_type="dpmsolver++", solver_order=1)
    scheduler.set_timesteps(timesteps=table.t.astype(int).tolist())
    compare(table, scheduler, kind)
    theirs = scheduler_of("DDIM", schedule, kind, timestep_spacing="linspace", clip_sample=False)
    theirs.set_timesteps(steps)
    np.testing.assert_array_equal(theirs.timesteps.numpy(), table.t)


@cases
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(schedule: str, kind: str, steps: int, spacing: str, variance: str) -> None:
    """diffusers draws noise at the last step unless its timestep is 0; the published samplers never do, nor do we
    without ``last_noise``. So where ``trailing`` ends above 0, the last noise is zero."""
    learned = variance == "learned"
    theirs = "learned_range" if learned else variance.replace("-", "_")
    scheduler = scheduler_of("DDPM", schedule, kind, timestep_spacing=spacing, clip_sample=False, variance_type=theirs)
    scheduler.set_timesteps(steps)
    table = make_table("ddpm", noise_of(schedule), steps, spacing=spacing, variance=variance)
    compare(table, scheduler, kind, learned=learned, silent_end=table.t[-1] > 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", ["fixed-large", "learned"])
def test_ddpm_with_its_last_noise(schedule: str, variance: str) -> None:
    learned = variance == "learned"
    theirs = "learned_range" if learned else "fixed_large"
    scheduler = scheduler_of(
        "DDPM", schedule, "eps", timestep_spacing="trailing", clip_sample=False, variance_type=theirs
    )
    scheduler.set_timesteps(10)
    table = make_table("ddpm", noise_of(schedule), 10, spacing="trailing", variance=variance, last_noise=True)
    assert table.S[-1] > 0
    compare(table, scheduler, "eps", learned=learned)


def euler_bound(schedule: str) -> float:
    """Squared-cosine starts at sigma 2e4, and diffusers' first step takes x' (about 5) as x + dx in float32: the
    rounding of x, 2e4 * 6e-8 = 1e-3, is what x' is wrong by."""
    return 1e-3 if schedule == "squared-cosine" else RELATIVE


@cases
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler(schedule: str, kind: str, steps: int, spacing: str) -> None:
    scheduler = scheduler_of("EulerDiscrete", schedule, kind, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    table = make_table("euler", noise_of(schedule), steps, spacing=spacing)
    compare(table, scheduler, kind, relative=euler_bound(schedule))


@cases
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral(schedule: str, kind: str, steps: int, spacing: str) -> None:
    """diffusers has no x0 prediction here: it is given the same denoiser as an eps model."""
    theirs = "eps" if kind == "x0" else kind
    scheduler = scheduler_of("EulerAncestralDiscrete", schedule, theirs, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    table = make_table("euler-ancestral", noise_of(schedule), steps, spacing=spacing)
    compare(table, scheduler, kind, their_kind=theirs, relative=euler_bound(schedule))


@cases
@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
def test_euler_on_sigmas(schedule: str, kind: str, steps: int, sigmas: str) -> None:
    scheduler = scheduler_of("EulerDiscrete", schedule, kind, **{f"use_{sigmas}_sigmas": True})
    scheduler.set_timesteps(steps)
    compare(make_table("euler", noise_of(schedule), steps, sigmas=sigmas), scheduler, kind)


@cases
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", DPM)
def test_dpmpp(schedule: str, kind: str, steps: int, spacing: str, solver: str) -> None:
    scheduler = scheduler_of("DPMSolverMultistep", schedule, kind, **DPM[solver], timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    compare(make_table(solver, noise_of(schedule), steps, spacing=spacing), scheduler, kind)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", ["euler", *DPM])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_final_sigma_min(schedule: str, steps: int, solver: str, spacing: str) -> None:
    name = "EulerDiscrete" if solver == "euler" else "DPMSolverMultistep"
    config = {**DPM.get(solver, {}), "timestep_spacing": spacing, "final_sigmas_type": "sigma_min"}
    scheduler = scheduler_of(name, schedule, "v", **config)
    scheduler.set_timesteps(steps)
    table = make_table(solver, noise_of(schedule), steps, spacing=spacing, final="sigma-min")
    compare(table, scheduler, "v", relative=euler_bound(schedule) if solver == "euler" else RELATIVE)


@cases
@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
@pytest.mark.parametrize("solver", DPM)
def test_dpmpp_on_sigmas(schedule: str, kind: str, steps: int, solver: str, sigmas: str) -> None:
    """diffusers' DPM-Solver tells the model a whole timestep (rounded for Karras, cut off otherwise) where its own
    Euler tells the exact one, as we do; so its model is told ours."""
    scheduler = scheduler_of("DPMSolverMultistep", schedule, kind, **DPM[solver], **{f"use_{sigmas}_sigmas": True})
    scheduler.set_timesteps(steps)
    table = make_table(solver, noise_of(schedule), steps, sigmas=sigmas)
    assert np.abs(scheduler.timesteps.numpy() - table.t).max() < 1 + 1e-3
    bound = 3 * RELATIVE if solver == "dpmpp-3m" and schedule == "squared-cosine" else RELATIVE  # float32 sigmas
    compare(table, scheduler, kind, t=scheduler.timesteps.numpy(), seen=table.t, relative=bound)


@cases
def test_lcm(schedule: str, kind: str, steps: int) -> None:
    scheduler = scheduler_of("LCM", schedule, kind, clip_sample=False)
    scheduler.set_timesteps(steps, original_inference_steps=50)
    compare(make_table("lcm", noise_of(schedule), steps), scheduler, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd(kind: str, steps: int, eta: float) -> None:
    scheduler = scheduler_of("TCD", "scaled-linear", kind)
    scheduler.set_timesteps(steps)
    compare(make_table("tcd", noise_of("scaled-linear"), steps, eta=eta), scheduler, kind, eta=eta)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, *STEPS])
@pytest.mark.parametrize("final", ["zero", "sigma-min"])
def test_pndm(schedule: str, kind: str, steps: int, final: str) -> None:
    """diffusers takes an estimate of the noise from a v-prediction only after it has extrapolated."""
    config = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": final == "zero"}
    scheduler = scheduler_of("PNDM", schedule, kind, **config)
    if final == "sigma-min":
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    table = make_table("pndm", noise_of(schedule), steps, spacing="leading", steps_offset=1, final=final, remember=kind)
    assert table.steps == (steps + 1 if steps > 1 else 1)
    compare(table, scheduler, kind)


UNIPC_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [  # theirs, ours
    ({}, {}),
    ({"solver_order": 1}, {"order": 1}),
    ({"solver_order": 3}, {"order": 3}),
    # (bh1 of diffusers is NaN at a last step without noise)
    ({"solver_type": "bh1", "final_sigmas_type": "sigma_min", "solver_order": 3},
     {"formula": "bh1", "final": "sigma-min", "order": 3}),
    ({"disable_corrector": [0, 1]}, {"uncorrected": "0,1"}),
    ({"lower_order_final": False, "solver_order": 3, "final_sigmas_type": "sigma_min"},
     {"lower_order_final": False, "order": 3, "final": "sigma-min"}),
]  # fmt: skip


@cases
@pytest.mark.parametrize(("config", "options"), UNIPC_CASES)
def test_unipc(schedule: str, kind: str, steps: int, config: dict[str, Any], options: dict[str, Any]) -> None:
    scheduler = scheduler_of("UniPCMultistep", schedule, kind, timestep_spacing="trailing", **config)
    scheduler.set_timesteps(steps)
    table = make_table("unipc", noise_of(schedule), steps, spacing="trailing", **options)
    compare(table, scheduler, kind, relative=unipc_bound(schedule))


def unipc_bound(schedule: str) -> float:
    """diffusers solves for its weights in float32 from sigmas in float32."""
    return 1e-2 if schedule == "squared-cosine" else 1e-4


@cases
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_unipc_spacings(schedule: str, kind: str, steps: int, spacing: str) -> None:
    scheduler = scheduler_of("UniPCMultistep", schedule, kind, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    table = make_table("unipc", noise_of(schedule), steps, spacing=spacing)
    compare(table, scheduler, kind, relative=unipc_bound(schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", DPM)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"solver_type": "heun"}, {"second_order": "heun"}),
        ({"euler_at_final": True, "final_sigmas_type": "sigma_min"}, {"euler_at_final": True, "final": "sigma-min"}),
        (
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            {"lower_order_final": False, "final": "sigma-min"},
        ),
    ],
)
def test_dpmpp_options(schedule: str, steps: int, solver: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    scheduler = scheduler_of("DPMSolverMultistep", schedule, "v", **DPM[solver], **config)
    scheduler.set_timesteps(steps)
    compare(make_table(solver, noise_of(schedule), steps, spacing="linspace", **options), scheduler, "v")


@cases
@pytest.mark.parametrize(("spacing", "count"), [("linspace", 0), ("trailing", 7), ("trailing", 30)])
def test_ddim_by_strides(schedule: str, kind: str, steps: int, spacing: str, count: int) -> None:
    scheduler = scheduler_of("DDIM", schedule, kind, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(count or steps)
    table = make_table("ddim", noise_of(schedule), count or steps, spacing=spacing, step_to="stride")
    compare(table, scheduler, kind)


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear"])
@pytest.mark.parametrize(
    ("solver", "theirs", "config"),
    [
        ("ddim", "DDIM", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("ddpm", "DDPM", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("euler", "EulerDiscrete", {"timestep_spacing": "trailing"}),
        ("euler-ancestral", "EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
        *((name, "DPMSolverMultistep", {**config, "timestep_spacing": "trailing"}) for name, config in DPM.items()),
        ("unipc", "UniPCMultistep", {"timestep_spacing": "trailing"}),
        ("pndm", "PNDM", {"timestep_spacing": "trailing", "skip_prk_steps": True}),
        ("lcm", "LCM", {"clip_sample": False}),
    ],
)
def test_as_shipped(schedule: str, solver: str, theirs: str, config: dict[str, Any]) -> None:
    """Untouched schedulers, with their float32 betas."""
    scheduler = scheduler_of(theirs, schedule, "eps", exact=False, **config)
    scheduler.set_timesteps(20)
    options: dict[str, Any] = {} if solver == "lcm" else {"spacing": "trailing"}
    compare(make_table(solver, noise_of(schedule), 20, **options), scheduler, "eps", relative=1e-4)
