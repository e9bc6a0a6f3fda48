"""What differs between members and can be adapted is adapted, and said in the notes; where parts are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.tiny_checkpoints import PNDM, SD, pieces, planned, said, text_recipe
from support.tiny_families import clip_text_folder, controlnet_folder, unet_folder, vae_folder
from tstitch_engines.bundle.manifest import NoiseScheduleSpec, TextInputs
from tstitch_engines.spec import Range
from tstitch_export.planning.recipe import load_recipe

NOISE = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pieces(tmp_path_factory.mktemp("whole") / "sd", **SD)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_recipe(tmp_path_factory.mktemp("recipe") / "pair.toml")


# --- conventions


def test_nothing_is_said_of_equal_members(recipe: Path, sd: Path) -> None:
    plan = planned(recipe, members={"small": sd, "large": sd})
    assert set(plan.parts) == {"text_encoder", "vae_decoder", "vae_encoder"}
    said(plan, "the default solver is pndm, as the scheduler of member 'large' (unet) states")
    assert len(plan.conventions.notes) == 1
    text = TextInputs(hidden=("text_encoder",), width=32)
    for adapted in plan.conventions.members.values():
        assert (adapted.parametrisation, adapted.noise, adapted.latent_ratio, adapted.text) == ("eps", None, 1.0, text)


def test_sd2_before_sd1(recipe: Path, sd: Path, tmp_path: Path) -> None:
    """A v member whose text comes from an encoder of its own, 64 wide, before an eps member with one of 32."""
    v = {**PNDM, "prediction_type": "v_prediction"}
    sd2 = pieces(tmp_path / "sd2", **{**SD, "text": 64, "scheduler": v}, cross_attention_dim=64)
    plan = planned(recipe, members={"small": sd2, "large": sd})
    small, large = (plan.conventions.members[name] for name in ("small", "large"))
    assert (small.parametrisation, large.parametrisation) == ("v", "eps")
    said(plan, "member 'small' (unet) predicts v, as its scheduler_config.json says")
    assert set(plan.parts) == {"text_encoder", "small_text_encoder", "vae_decoder", "vae_encoder"}
    assert small.text == TextInputs(hidden=("small_text_encoder",), width=64)
    assert large.text == TextInputs(hidden=("text_encoder",), width=32)
    assert plan.parts["small_text_encoder"].inspection.config["width"] == 64


def test_noise_schedules_and_counts_of_timesteps(recipe: Path, sd: Path, tmp_path: Path) -> None:
    linear = {**PNDM, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    for changes, own in (
        (linear, NoiseScheduleSpec(kind="linear")),
        ({**PNDM, "num_train_timesteps": 500}, NoiseScheduleSpec(**{**_fields(NOISE), "steps": 500})),
    ):
        other = pieces(tmp_path / f"{own.kind}{own.steps}", scheduler=changes)
        plan = planned(recipe, members={"small": other, "large": sd})
        assert plan.conventions.noise == NOISE
        assert (plan.conventions.members["small"].noise, plan.conventions.members["large"].noise) == (own, None)
        said(plan, "'small' (unet) was trained with the noise schedule", f"{own.steps} steps", "of equal noise")
        plan = planned(recipe, members={"small": sd, "large": other})  # the last one's is the bundle's
        assert plan.conventions.noise == own
        assert (plan.conventions.members["small"].noise, plan.conventions.members["large"].noise) == (NOISE, None)


def _fields(noise: NoiseScheduleSpec) -> dict[str, Any]:
    return {name: getattr(noise, name) for name in noise.__struct_fields__}


def test_a_bare_member_was_trained_as_the_recipe_says(recipe: Path, sd: Path, tmp_path: Path) -> None:
    linear = {**PNDM, "beta_schedule": "linear"}
    other = pieces(tmp_path / "linear", scheduler=linear)
    plan = planned(recipe, members={"small": sd / "unet", "large": other})
    assert plan.conventions.members["small"].noise == NOISE


def test_scaled_latents(recipe: Path, sd: Path, tmp_path: Path) -> None:
    twice = pieces(tmp_path / "twice", vae={"scaling_factor": 0.3643})
    plan = planned(recipe, members={"small": twice, "large": sd})
    assert plan.conventions.latent.scaling == 0.18215
    assert plan.conventions.members["small"].latent_ratio == pytest.approx(2.0)
    said(plan, "'small' (unet) was trained on latents scaled by 0.3643, the bundle's by 0.18215", "scaled by 2")
    plan = planned(recipe, members={"small": sd / "unet", "large": twice})
    assert plan.conventions.latent.scaling == 0.3643
    assert plan.conventions.members["small"].latent_ratio == 1, "one that states nothing is what the bundle is"
    said(plan, "the latent is scaled by 0.3643, as member 'large' (unet) states; the recipe says 0.18215")


def test_a_shift_that_all_share(recipe: Path, tmp_path: Path) -> None:
    shifted = pieces(tmp_path / "shifted", vae={"scaling_factor": 0.18215, "shift_factor": 0.25})
    plan = planned(recipe, members={"small": shifted, "large": shifted})
    assert plan.conventions.latent.shift == 0.25
    said(plan, "the latent is shifted by 0.25, as member 'large' (unet) states; the recipe says 0")


def test_a_pipeline_with_a_tiny_autoencoder_states_no_scale(recipe: Path, sd: Path, tmp_path: Path) -> None:
    """It takes the denoiser's latent as it is: its own factor of 1 says nothing of the autoencoder before it."""
    tiny = pieces(tmp_path / "tiny", text=32, vae={"kind": "tiny"})
    plan = planned(recipe, members={"small": sd, "large": tiny})
    assert plan.conventions.latent.scaling == 0.18215
    assert [adapted.latent_ratio for adapted in plan.conventions.members.values()] == [1.0, 1.0]
    assert plan.parts["vae_decoder"].inspection.config["kind"] == "tiny"


def test_an_autoencoder_goes_before_the_recipe(recipe: Path, sd: Path, tmp_path: Path) -> None:
    vae_folder(tmp_path / "vae", levels=3, scaling_factor=0.5)
    both = {"small": sd / "unet", "large": sd / "unet"}
    parts = {"vae_decoder": tmp_path / "vae", "vae_encoder": tmp_path / "vae"}
    plan = planned(recipe, members=both, parts=parts)
    assert plan.conventions.latent.scaling == 0.5
    said(plan, "the latent is scaled by 0.5, as part 'vae_decoder' (vae) states; the recipe says 0.18215")
    assert plan.conventions.decoder.factor == 4
    said(plan, "part 'vae_decoder' (vae) has 4 pixels per latent element; the recipe says 8")


def test_sizes_are_the_last_members_for_every_network(recipe: Path, sd: Path, tmp_path: Path) -> None:
    """Native sizes differ, and all have to take the same latent."""
    larger = pieces(tmp_path / "larger", sample_size=12)
    controlnet_folder(tmp_path / "control")
    plan = planned(recipe, members={"small": sd, "large": larger}, parts={"controlnet": tmp_path / "control"})
    assert (plan.conventions.latent.height, plan.conventions.latent.width) == (12, 12)
    sizes = plan.sizes(batch=Range(1, 2, 4), height=None, width=None, tokens=None)
    found = {network.name: network.profile(sizes).dims for network in plan.networks}
    twelve = Range(12, 12, 12)
    for name in ("small", "large", "vae_decoder", "vae_encoder", "controlnet"):
        assert (found[name]["H"], found[name]["W"]) == (twelve, twelve), name
    assert found["vae_decoder"]["B"] == Range(1, 1, 1)
    assert found["text_encoder"] == {"B": Range(1, 2, 4)}
    assert found["large"]["T"] == found["controlnet"]["T"] == Range(77, 77, 231)


# --- schedulers


def test_the_last_pipelines_scheduler_is_taken_over(recipe: Path, sd: Path, tmp_path: Path) -> None:
    euler = pieces(tmp_path / "euler", scheduler={**PNDM, "_class_name": "EulerDiscreteScheduler"})
    found = planned(recipe, members={"small": sd, "large": euler})
    assert found.conventions.scheduler is not None
    assert (found.conventions.scheduler.solver, found.conventions.scheduler.spacing) == ("euler", "linspace")
    said(found, "the default solver is euler, as the scheduler of member 'large' (unet) states")
    bare = planned(recipe, members={"small": sd / "unet", "large": sd / "unet"})
    assert bare.conventions.scheduler is None
    assert not any("solver" in note for note in bare.conventions.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "HeunDiscreteScheduler"}, "HeunDiscreteScheduler"),
        ({"skip_prk_steps": False}, "skip_prk_steps"),
    ],
)
def test_a_scheduler_that_no_solver_is_leaves_the_recipes(
    changes: Any, words: str, recipe: Path, tmp_path: Path
) -> None:
    other = pieces(tmp_path / "other", scheduler={**PNDM, **changes})
    plan = planned(recipe, members={"small": other, "large": other})
    assert plan.conventions.scheduler is None
    assert plan.conventions.noise == NOISE, "its noise is what the model was trained with, whatever steps through it"
    said(plan, "the default solver is ddim, as the recipe says", "is not taken over", words)


# --- shipped recipes over tiny checkpoints of their kind


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sd15-bksdm-tiny", {"small": "bksdm", "large": "sd", "base": "bksdm"}),
        ("sdxl-ssd1b", {"small": "ssd1b", "large": "sdxl"}),
        ("sdxl-base-refiner", {"base": "sdxl", "refiner": "refiner"}),
    ],
)
def test_shipped_recipes_fit_their_models(name: str, kinds: dict[str, str], tmp_path: Path) -> None:
    for member, kind in kinds.items():
        unet_folder(tmp_path / member, kind)
    last = list(kinds)[-1]
    if name != "sd15-bksdm-tiny":
        clip_text_folder(tmp_path / last, "text_encoder_2", width=32, projection=32 if last == "refiner" else 16)
    if last != "refiner":
        clip_text_folder(tmp_path / last)
    vae_folder(tmp_path / last / "vae", levels=4, scaling_factor=load_recipe(name)[0].latent.scaling)
    plan = planned(name, members={member: tmp_path / member for member in kinds})
    assert {"vae_decoder", "vae_encoder"} <= set(plan.parts)
    assert plan.conventions.decoder.kind == "vae"
    text = plan.conventions.members[last].text
    assert text is not None
    assert text.hidden == {"base": ("text_encoder",), "large": ("text_encoder", "text_encoder_2")}.get(
        last, ("text_encoder_2",)
    )
    if last == "large":
        assert plan.parts["text_encoder"].inspection.config["hidden_state"] == -2
    if last == "refiner":
        said(plan, "member 'base' has no text_encoder")


def test_the_scheduler_file_is_read_as_diffusers_writes_it(recipe: Path, sd: Path, tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler

    folder = shutil.copytree(sd, tmp_path / "unipc")
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    settings = {"solver_order": 2, **{key: config[key] for key in ("beta_schedule", "beta_start", "beta_end")}}
    made: Any = UniPCMultistepScheduler
    made(**settings).save_pretrained(folder / "scheduler")
    plan = planned(recipe, members={"small": sd, "large": folder})
    assert plan.conventions.scheduler is not None
    assert plan.conventions.scheduler.solver == "unipc"
    assert plan.conventions.noise == NOISE
