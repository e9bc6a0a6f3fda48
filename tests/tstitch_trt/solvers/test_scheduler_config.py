"""Scheduler configurations as they are published: read, and walked beside diffusers' ``from_config`` of the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from support.diffusers_trajectory import compare
from support.manifests import manifest
from tstitch_engines.bundle.manifest import Defaults, NoiseScheduleSpec
from tstitch_engines.bundle.scheduler_config import SCHEDULERS, read_scheduler, read_training
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.plan.plan import make_plan
from tstitch_trt.solvers import SolverOptions, StepTable, make_table, with_default_spacing
from tstitch_trt.solvers.noise_schedule import NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SD15 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **LATENT, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
SDXL = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **LATENT, "clip_sample": False,
    "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}  # fmt: skip
SD21 = {
    "_class_name": "DDIMScheduler", **LATENT, "clip_sample": False, "prediction_type": "v_prediction",
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
TURBO = {
    "_class_name": "EulerAncestralDiscreteScheduler", **LATENT, "clip_sample": False, "interpolation_type": "linear",
    "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "trailing", "trained_betas": None,
    "rescale_betas_zero_snr": False,
}  # fmt: skip
DPM = {**SDXL, "_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "leading"}
UNIPC = {**SD15, "_class_name": "UniPCMultistepScheduler"}

# Of other classes, carried along by from_config: Euler reads none of them.
OTHERS = {
    "thresholding": True, "use_lu_lambdas": True, "use_flow_sigmas": True, "lambda_min_clipped": -5.1,
    "timestep_type": "continuous", "predict_x0": False, "skip_prk_steps": False, "variance_type": "learned",
}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "sd15": (SD15, (1, 2, 20, 30, 50)),
    "sd15-v": ({**SD15, "prediction_type": "v_prediction"}, (20,)),
    "pndm-trailing": ({**SD15, "timestep_spacing": "trailing"}, (1, 2, 7, 20)),
    "pndm-linspace-v": ({**SD15, "timestep_spacing": "linspace", "prediction_type": "v_prediction"}, (3, 20)),
    "pndm-to-one": ({**SD15, "set_alpha_to_one": True, "steps_offset": 0}, (20,)),
    "sd21": (SD21, (20, 50)),
    "sd15-ddim": ({**SD15, "_class_name": "DDIMScheduler"}, (20, 30)),
    "ddim-to-one": ({**SD21, "set_alpha_to_one": True, "steps_offset": 0}, (30,)),
    "ddim-trailing": ({**SD21, "timestep_spacing": "trailing"}, (7, 30, 50)),
    "ddim-linspace": ({**SD21, "timestep_spacing": "linspace"}, (20,)),
    "ddpm": ({**SD21, "_class_name": "DDPMScheduler"}, (20,)),
    "ddpm-large": ({**SD21, "_class_name": "DDPMScheduler", "variance_type": "fixed_large", "steps_offset": 0}, (20,)),
    "ddpm-log": ({**SD21, "_class_name": "DDPMScheduler", "variance_type": "fixed_small_log"}, (20,)),
    "sdxl": (SDXL, (20, 30, 50)),
    "sd-turbo": ({**SDXL, "timestep_spacing": "trailing", "steps_offset": 1}, (1, 4)),
    "euler-defaults": ({"_class_name": "EulerDiscreteScheduler"}, (20,)),
    "euler-sigma-min": ({**SDXL, "final_sigmas_type": "sigma_min"}, (20,)),
    "sdxl-karras": ({**SDXL, "use_karras_sigmas": True}, (20, 30)),
    "euler-karras-trailing": ({**SDXL, "use_karras_sigmas": True, "timestep_spacing": "trailing"}, (20,)),
    "euler-exponential": ({**SDXL, "use_exponential_sigmas": True, "timestep_spacing": "linspace"}, (20,)),
    "euler-karras-ends": ({**SDXL, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}, (20,)),
    "sdxl-turbo": (TURBO, (1, 2, 4)),
    "sd15-euler-ancestral": ({**SD15, "_class_name": "EulerAncestralDiscreteScheduler"}, (20,)),
    "dpm": (DPM, (10, 20)),
    "dpm-karras": ({**DPM, "use_karras_sigmas": True}, (10, 20, 30)),
    "dpm-karras-cosine": (
        {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True,
         "prediction_type": "v_prediction"},
        (20,),
    ),
    "dpm-exponential": ({**DPM, "use_exponential_sigmas": True}, (20,)),
    "dpm-karras-ends": ({**DPM, "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}, (20,)),
    "dpm-sde-karras": ({**DPM, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, (10, 20)),
    "dpm-sde-heun": ({**DPM, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, (20,)),
    "dpm-3": ({**DPM, "solver_order": 3, "timestep_spacing": "trailing"}, (10, 20)),
    "dpm-3-sde": ({**DPM, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, (20,)),
    "dpm-final": ({**DPM, "euler_at_final": True, "final_sigmas_type": "sigma_min"}, (20,)),
    "dpm-keeps-order": (
        {**DPM, "lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_type": "bh2"}, (10,)
    ),
    "dpm-defaults": ({"_class_name": "DPMSolverMultistepScheduler"}, (20,)),
    "unipc": (UNIPC, (10, 20, 50)),
    "unipc-leading": ({**UNIPC, "timestep_spacing": "leading"}, (20,)),
    "unipc-3": ({**UNIPC, "solver_order": 3}, (10, 20)),
    "unipc-karras": ({**UNIPC, "use_karras_sigmas": True}, (20,)),
    "unipc-exponential": ({**UNIPC, "use_exponential_sigmas": True, "disable_corrector": [0, 1]}, (20,)),
    "unipc-bh1": ({**UNIPC, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, (20,)),
    "lcm": ({**SDXL, "_class_name": "LCMScheduler", "original_inference_steps": 50}, (1, 4, 8)),
    "lcm-defaults": ({"_class_name": "LCMScheduler"}, (4,)),
    "lcm-scaling": ({**SDXL, "_class_name": "LCMScheduler", "timestep_scaling": 2.0}, (4,)),
    "dpm-1": ({**DPM, "solver_order": 1}, (10,)),
    "dpm-1-sde": ({**DPM, "solver_order": 1, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, (10,)),
    "dpm-lu": ({**DPM, "use_lu_lambdas": True}, (10,)),
    "dpm-clipped": ({**DPM, "lambda_min_clipped": -2.0}, (10,)),
    "dpm-off-by-null": ({**DPM, "lower_order_final": None, "final_sigmas_type": "sigma_min"}, (10,)),
    "unipc-sigma-min": (
        {**UNIPC, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_min": 0.05}, (1, 8)
    ),
    "ddim-off-by-null": ({**SD21, "set_alpha_to_one": None}, (20,)),
    "ddim-parallel": ({**SD21, "_class_name": "DDIMParallelScheduler"}, (20,)),
    "ddpm-parallel": ({**SD21, "_class_name": "DDPMParallelScheduler"}, (20,)),
    "trailing-ties": ({**SDXL, "timestep_spacing": "trailing"}, (48, 96)),
    "cosine-without-a-range": (
        {**SD21, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.1, "beta_end": 0.01}, (10,)
    ),
    **{f"karras-one-step-{name}": ({**config, "use_karras_sigmas": True}, (1,))
       for name, config in (("euler", SDXL), ("dpm", DPM), ("unipc", UNIPC))},
    **{f"other-keys-{name}": ({"_class_name": name, **LATENT, "clip_sample": False, **OTHERS}, (10,))
       for name in ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler")},
}  # fmt: skip


def table_of(config: dict[str, Any], steps: int) -> StepTable:
    read = read_scheduler(config)
    options = with_default_spacing(SolverOptions.parse(read.solver, read.options), read.spacing)
    assert read.places == (options.spacing is not None)
    return make_table(options, NoiseSchedule.from_spec(read.noise), steps)


@pytest.mark.parametrize(("name", "steps"), [(name, n) for name, (_, counts) in CASES.items() for n in counts])
def test_equals_from_config(name: str, steps: int) -> None:
    """Untouched schedulers with their float32 betas and sigmas, which is what the bounds are for.

    This is what a bundle takes over, whose DDPM draws no last noise; test_scheduler_fuzz has what accelerate does.
    """
    diffusers = pytest.importorskip("diffusers")
    config = CASES[name][0]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    read, table = read_scheduler(config), table_of(config, steps)
    kind = read.parametrisation
    bound = 1e-3 if "unipc" in name or "cosine" in name else 1e-4
    t = None
    if read.options.get("sigmas"):  # diffusers finds timesteps of sigmas in float32, and cuts 998.9999 off to 998
        t = scheduler.timesteps.numpy()
        cut = read.options.get("sigma_timesteps") == "down"
        assert np.abs(t - table.t).max() < (1.001 if cut else 3e-3)
    seen = None if t is None else table.t
    compare(table, scheduler, kind, silent_end=read.solver == "ddpm", relative=bound, t=t, seen=seen)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "PNDM"])
@pytest.mark.parametrize("zero", [False, True])
def test_trained_betas(name: str, zero: bool) -> None:
    """They go before the formula, in a list or an array, and are rescaled like one."""
    diffusers = pytest.importorskip("diffusers")
    own = 1e-4 + 0.02 * np.linspace(0, 1, 800) ** 3
    for betas in (own, own.tolist()):
        config = {
            "trained_betas": betas, "num_train_timesteps": 800, "clip_sample": False, "skip_prk_steps": True,
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero, "timestep_spacing": "leading",
        }  # fmt: skip
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
        scheduler.set_timesteps(12)
        config["_class_name"] = f"{name}Scheduler"
        assert read_scheduler(config).noise.zero_terminal_snr == (zero and name != "PNDM")
        compare(table_of(config, 12), scheduler, "v", silent_end=name == "DDPM", relative=1e-4)


@pytest.mark.parametrize(
    "kind",
    ["ScoreSdeVp", "CMStochasticIterative", "FlowMapEulerDiscrete", "KarrasVe", "CogVideoXDPM", "IPNDM", "EDMEuler"],
)
def test_noise_that_is_not_of_betas_is_refused(kind: str) -> None:
    """Their configurations have no betas, or other noise beside them: the defaults of others are not theirs."""
    diffusers, name = pytest.importorskip("diffusers"), f"{kind}Scheduler"
    config = json.loads(getattr(diffusers.schedulers, name)().to_json_string())
    with pytest.raises(BadInput, match=f"_class_name is '{name}'; allowed is a class whose noise is that of its betas"):
        read_training(config, where="x")


def test_hints_do_not_change_how_a_model_was_trained() -> None:
    """And name no argument: the same refusals are met in folders and in loaded pipelines."""
    for config, hint in (
        ({"beta_schedule": "sigmoid"}, "correct beta_schedule if the model was trained otherwise; "),
        ({"clip_sample": True}, "change clip_sample, or take a scheduler of another class; read are DDIM"),
        ({"_class_name": "EDMEulerScheduler"}, "take a scheduler of another class; read are DDIM"),
    ):
        with pytest.raises(BadInput) as caught:
            (read_scheduler if "clip_sample" in config else read_training)(
                {"_class_name": "DDIMScheduler", **config}, where="x"
            )
        assert caught.value.hint is not None
        assert caught.value.hint.startswith(hint)


def test_what_sd15_says() -> None:
    read = read_scheduler(SD15)
    assert (read.solver, read.spacing, read.parametrisation) == ("pndm", "leading", "eps")
    assert read.options == {"final": "sigma-min", "steps_offset": 1}
    assert read.noise == NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding is True; allowed is false"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample is True"),
        ({"skip_prk_steps": None}, r"skip_prk_steps is False; allowed is True"),
        ({"trained_betas": [0.1]}, "trained_betas is [0.1]; allowed is null or a list of num_train_timesteps = 1000"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "allowed is null or numbers above 0 and below 1"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; allowed is 'linear'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"steps_offset": -1}, "steps_offset is -1; allowed is a whole number from 0 to 100000"),
        ({"beta_start": "low"}, "beta_start is 'low'; allowed is a number"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type is 'learned'"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "algorithm_type is 'dpmsolver'",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_beta_sigmas": True}, "use_beta_sigmas is True"),
        *[
            (
                {"_class_name": f"{name}Scheduler", "solver_order": 4},
                "solver_order is 4; allowed is a whole number from 1 to 3",
            )
            for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")
        ],
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0 is False; allowed is True"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True, "use_exponential_sigmas": True},
            "use_exponential_sigmas is True",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type is 'log_l"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timestep_type is 'continuous'",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": None}, "predict_x0 is False; allowed is True"),
        ({"beta_start": float("nan")}, "beta_start is nan; allowed is a number above 0 and below 1"),
        ({"beta_start": 0}, "beta_start is 0; allowed is a number above 0"),
        ({"beta_start": -5}, "beta_start is -5; allowed is a number above 0"),
        ({"beta_start": "0.1"}, "beta_start is '0.1'; allowed is a number"),
        ({"beta_end": 5}, "beta_end is 5; allowed is a number above 0.00085 and below 1"),
        ({"beta_end": 0.0001}, "beta_end is 0.0001; allowed is a number above 0.00085"),
        ({"beta_end": float("inf")}, "beta_end is inf"),
        ({"beta_schedule": ["linear"]}, "beta_schedule is ['linear']"),
        (
            {"num_train_timesteps": 10**9},
            "num_train_timesteps is 1000000000; allowed is a whole number from 1 to 100000",
        ),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        (
            {"set_alpha_to_one": "no", "_class_name": "DDIMScheduler"},
            "set_alpha_to_one is 'no'; allowed is true or false",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": "all"}, "disable_corrector is 'all'"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_max": float("inf")},
            "sigma_max is inf",
        ),
    ],
)
def test_what_can_t_be_honoured_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_scheduler({**SD15, **change}, where="model/scheduler/scheduler_config.json")
    assert says in caught.value.message
    assert caught.value.message.startswith("model/scheduler/scheduler_config.json: ")


def test_a_default_that_can_t_be_honoured_says_whose_it_is() -> None:
    with pytest.raises(BadInput, match=r"clip_sample is True \(the default of DDIMScheduler\)"):
        read_scheduler({"_class_name": "DDIMScheduler"})


def test_an_unknown_class_lists_the_known() -> None:
    with pytest.raises(UnknownName, match="did you mean 'EulerDiscreteScheduler'"):
        read_scheduler({"_class_name": "EulerDiscretScheduler"})
    for name in SCHEDULERS:
        assert name.endswith("Scheduler")


def test_a_bundle_s_defaults_are_for_its_own_solver() -> None:
    read = read_scheduler(SD15)
    bundle = manifest(defaults=Defaults(solver=read.solver, solver_options=dict(read.options), spacing=read.spacing))
    usual = make_plan(bundle, steps=20)
    assert (usual.solver.final, usual.solver.steps_offset, usual.solver.spacing) == ("sigma-min", 1, "leading")
    assert usual.steps == 21
    other = make_plan(bundle, steps=20, solver="ddim")  # the spacing is the bundle's, the rest DDIM's own
    assert (other.solver.final, other.solver.steps_offset, other.solver.spacing) == ("zero", 1, "leading")
    assert make_plan(bundle, steps=20, solver="euler", sigmas="karras").solver.steps_offset is None
    elsewhere = make_plan(bundle, steps=20, spacing="trailing").solver
    assert (elsewhere.spacing, elsewhere.steps_offset, elsewhere.final) == ("trailing", None, "sigma-min")
    own = make_plan(bundle, timesteps=[900.0, 500.0, 100.0])
    assert own.table.t.tolist() == [900.0, 500.0, 500.0, 100.0]
    assert own.solver.spacing is None
    assert make_plan(bundle, steps=20, solver_options={"final": "zero"}).solver.final == "zero"
