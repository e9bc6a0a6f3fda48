"""What files say of their training, and what follows: small files made by hand, one convention each."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from support.dits import diffusers_folder, published_state
from support.ldms import ldm_checkpoint
from support.tiny_checkpoints import PNDM, planned, text_recipe
from support.tiny_families import SDXL, STABLE_DIFFUSION_2, original_unet, unet_folder
from support.uvits import uvit_checkpoint
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.errors import BadCheckpoint, BadInput, TStitchError, UnknownName
from tstitch_export.checkpoint.noise_buffers import betas_of, noise_of
from tstitch_export.families import open_family
from tstitch_export.families.base import Inspection, Scalar
from tstitch_export.families.unet.conventions import SPREAD_OF

SD_NOISE = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
SPREAD_IN_FILE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
EMPTY = torch.zeros(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bare UNet folders ``sd``, ``xl`` and ``sd2``, and each as a single file NAME.safetensors."""
    root = tmp_path_factory.mktemp("unets")
    text = {"cross_attention_dim": 768, "attention_head_dim": 8}
    for name, kind, changes in (("sd", "sd", text), ("xl", "sdxl", SDXL), ("sd2", "sd", STABLE_DIFFUSION_2)):
        module = unet_folder(root / name, kind, part=None, norm_num_groups=32, **changes)
        state = original_unet(module)
        if name == "sd2":  # not trained
            state[SPREAD_IN_FILE] = torch.zeros_like(state[SPREAD_IN_FILE])
        save_file({key: value.contiguous() for key, value in state.items()}, root / f"{name}.safetensors")
    return root


def marked(
    folders: Path,
    name: str,
    path: Path,
    tensors: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    bare: bool = False,
) -> Path:
    """The single file ``name`` with more in it; ``bare``: as a UNet's own file, without the prefix of pipelines."""
    prefix = "model.diffusion_model." if bare else ""
    state = {key.removeprefix(prefix): value for key, value in load_file(folders / f"{name}.safetensors").items()}
    save_file({**state, **(tensors or {})}, path, metadata)
    return path


def inspect(path: Path, **options: Scalar) -> Inspection:
    return open_family("unet-sdxl" if "xl" in path.name else "unet-sd").inspect(path, options)


# --- markers and metadata


@pytest.mark.parametrize(
    ("tensors", "metadata", "prediction", "zero"),
    [
        ([], {}, None, None),
        (["v_pred"], {}, "v", None),
        (["v_pred", "ztsnr"], {}, "v", True),
        (["model.diffusion_model.v_pred", "model.diffusion_model.ztsnr"], {}, "v", True),
        ([], {"modelspec.prediction_type": "v"}, "v", None),
        ([], {"modelspec.prediction_type": "epsilon"}, "eps", None),
        ([], {"modelspec.predict_key": "v"}, "v", None),
        ([], {"prediction_type": "v_prediction"}, "v", None),
        ([], {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None, None),
        ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v", True),
        ([], {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, "eps", None),
        (["v_pred"], {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "true"}, "v", True),
        ([], {"modelspec.prediction_type": "None"}, None, None),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_what_a_single_file_says(
    tensors: list[str],
    metadata: dict[str, str],
    prediction: str | None,
    zero: bool | None,
    bare: bool,
    folders: Path,
    tmp_path: Path,
) -> None:
    path = marked(folders, "xl", tmp_path / "xl.safetensors", dict.fromkeys(tensors, EMPTY), metadata, bare)
    found = inspect(path).trained
    assert (found.prediction, found.noise, found.zero_snr) == (prediction, None, zero)


def test_markers_are_no_weights(folders: Path, tmp_path: Path) -> None:
    """Of a UNet's own file, in which they stand beside its tensors, and of a folder of diffusers."""
    want = open_family("unet-sdxl").load(inspect(folders / "xl.safetensors"))
    markers = {"v_pred": torch.zeros(1), "ztsnr": EMPTY}
    file = marked(folders, "xl", tmp_path / "xl.safetensors", markers, bare=True)
    folder = shutil.copytree(folders / "xl", tmp_path / "xl")
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), **markers}, weights)
    for path in (file, folder):
        found = inspect(path)
        assert (found.trained.prediction, found.trained.zero_snr) == ("v", True)
        got = open_family("unet-sdxl").load(found).state_dict()
        assert all(torch.equal(got[key], tensor) for key, tensor in want.state_dict().items())


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, "v by its marker tensor v_pred and eps by its metadata"),
        ([], {"modelspec.prediction_type": "v", "ss_v_parameterization": "False"}, "contradicts itself"),
        ([], {"modelspec.prediction_type": "rectified_flow"}, "the velocity of a flow, as its metadata"),
        ([], {"modelspec.prediction_type": "score"}, "predicts 'score', as its metadata"),
        (["ztsnr"], {}, "without any signal at its last timestep, as its marker tensor ztsnr says, and nothing says"),
        ([], {"ss_zero_terminal_snr": "True"}, "nothing says that it predicts v"),
    ],
)
def test_contradictions_are_refused_unless_the_option_decides(
    tensors: list[str], metadata: dict[str, str], words: str, folders: Path, tmp_path: Path
) -> None:
    path = marked(folders, "xl", tmp_path / "xl.safetensors", dict.fromkeys(tensors, EMPTY), metadata)
    with pytest.raises(BadCheckpoint, match=words) as caught:
        inspect(path)
    assert "--option MEMBER.prediction=" in caught.value.hint
    assert 'options={"MEMBER.prediction": ' in caught.value.hint
    assert inspect(path, prediction="v").trained.prediction == "v"


@pytest.mark.parametrize("marker", ["edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"])
def test_models_without_betas_are_refused_by_name(marker: str, folders: Path, tmp_path: Path) -> None:
    path = marked(folders, "xl", tmp_path / "xl.safetensors", {marker: torch.ones(4)})
    with pytest.raises(BadCheckpoint, match="Playground" if "edm_m" in marker or "std" in marker else "CosXL"):
        inspect(path, prediction="v")


def test_a_name_that_says_v_is_not_taken_for_eps(folders: Path, tmp_path: Path) -> None:
    for name in ("xl-vpred.safetensors", "noob-xl_v-pred-1.0.safetensors", "xlNAI_vPred10.safetensors"):
        with pytest.raises(BadCheckpoint, match="its name sounds like v, and nothing in it says so"):
            inspect(marked(folders, "xl", tmp_path / name))
    with pytest.raises(BadCheckpoint, match="its title sounds like v, and nothing else in it says so"):
        inspect(marked(folders, "xl", tmp_path / "xl.safetensors", metadata={"modelspec.title": "Noob v-pred"}))
    with pytest.raises(BadCheckpoint, match="its name sounds like x0") as caught:
        inspect(marked(folders, "xl", tmp_path / "sdxl_lightning_1step_unet_x0.safetensors"))
    assert "--option MEMBER.prediction=x0" in caught.value.hint
    assert (
        inspect(marked(folders, "xl", tmp_path / "xl-vpred.safetensors", {"v_pred": EMPTY})).trained.prediction == "v"
    )


def test_notes_of_what_else_metadata_says(folders: Path, tmp_path: Path) -> None:
    usual = {"modelspec.timestep_range": "0,1000", "modelspec.encoder_layer": "1"}
    assert inspect(marked(folders, "sd", tmp_path / "sd.safetensors", metadata=usual)).trained.notes == ()
    expert = {"modelspec.timestep_range": "500,999", "modelspec.encoder_layer": "2"}
    part, skip = inspect(marked(folders, "sd", tmp_path / "sd.safetensors", metadata=expert)).trained.notes
    assert "a part of the timesteps" in part
    assert "500,999" in part
    assert "clip_skip" in skip
    strange = {"modelspec.timestep_range": "500,999 \x1b[31m" + "x" * 100_000}
    (note,) = inspect(marked(folders, "sd", tmp_path / "sd.safetensors", metadata=strange)).trained.notes
    assert len(note) < 250
    assert note.isprintable()


def test_the_size_that_metadata_says(folders: Path, tmp_path: Path) -> None:
    for said, want in (("768x512", (4, 64, 96)), ("1000x1000", (4, 64, 64)), ("large", (4, 64, 64))):
        path = marked(folders, "sd", tmp_path / "sd.safetensors", metadata={"modelspec.resolution": said})
        assert inspect(path).latent == want


# --- a configuration beside a single file

YAML = """
model:
  base_learning_rate: 1.0e-04
  target: {target}
  params:
{params}
    first_stage_key: "jpg"
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
"""
LDM_TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"


@pytest.mark.parametrize(
    ("target", "params", "prediction", "noise"),
    [
        (LDM_TARGET, ['parameterization: "v"'], "v", None),
        (LDM_TARGET, ["parameterization: v  # as trained", "linear_start: 0.00085", "linear_end: 0.0120",
                      "timesteps: 1000"], "v", SD_NOISE),
        (LDM_TARGET, ["linear_start: 0.0015"], "eps", None),
        ("sgm.models.diffusion.DiffusionEngine",
         ["  target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling"], "v", None),
        ("sgm.models.diffusion.DiffusionEngine",
         ["  target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling"], "eps", None),
        ("my.own.Model", ['parameterization: "v"'], None, None),
    ],
)  # fmt: skip
def test_the_configuration_beside_a_file(
    target: str,
    params: list[str],
    prediction: str | None,
    noise: NoiseScheduleSpec | None,
    folders: Path,
    tmp_path: Path,
) -> None:
    path = marked(folders, "sd", tmp_path / "sd.v1.safetensors")
    config = tmp_path / "sd.v1.yaml"
    config.write_text(YAML.format(target=target, params="\n".join(f"    {line}" for line in params)))
    found = inspect(path)
    assert (found.parametrisation, found.noise) == (prediction, noise)
    assert found.files == (config, path)


def test_configurations_that_are_refused(folders: Path, tmp_path: Path) -> None:
    path = marked(folders, "xl", tmp_path / "xl.safetensors", {"v_pred": EMPTY})
    for params, words in (
        ("", r"v by its marker tensor v_pred and eps by xl\.yaml beside it"),
        ("    parameterization: score", "score"),
        ("    parameterization: v\n    linear_start: 2\n    linear_end: 1", "no schedule of betas"),
        ("    parameterization: v\n    linear_start: 1e-4\n    linear_end: 0.02\n    timesteps: x", "no schedule"),
    ):
        (tmp_path / "xl.yaml").write_text(YAML.format(target=LDM_TARGET, params=params))
        with pytest.raises(BadCheckpoint, match=words):
            inspect(path)
    for content in (b"\xff" * 10, b"x" * (64 << 20)):
        (tmp_path / "xl.yaml").write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"xl\.yaml is damaged"):
            inspect(path)
    for content in ("\n" * (1 << 20), f"target: ldm.models.x{'.a' * (1 << 19)}\nparameterization: v"):
        (tmp_path / "xl.yaml").write_text(content)
        assert inspect(path).parametrisation == "v"


# --- Stable Diffusion 2.x


@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("form", ["file", "half", "folder"])
def test_the_branches_of_stable_diffusion_2(spread: float, form: str, folders: Path, tmp_path: Path) -> None:
    """512-base predicts eps, 768-v predicts v: the native size follows."""
    bias = torch.randn(64, generator=torch.Generator().manual_seed(0))
    bias *= spread / bias.std(correction=0)
    if form == "folder":
        path = shutil.copytree(folders / "sd2", tmp_path / "sd2")
        weights = path / "diffusion_pytorch_model.safetensors"
        save_file({**load_file(weights), SPREAD_OF: bias}, weights)
    else:
        stored = bias.half() if form == "half" else bias
        path = marked(folders, "sd2", tmp_path / "sd2.safetensors", {SPREAD_IN_FILE: stored})
    found, prediction = inspect(path), "v" if spread > 0.09 else "eps"
    assert found.trained.prediction == prediction
    assert f"predicts {prediction}, as the spread {spread:.3g} of up_blocks.3" in found.trained.notes[0]
    if form != "folder":
        assert found.latent == ((4, 96, 96) if prediction == "v" else (4, 64, 64))


@pytest.mark.parametrize("step", [875_000, 110_000])
def test_the_step_at_which_the_published_files_were_saved(step: int, folders: Path, tmp_path: Path) -> None:
    """As diffusers' own loader of single files takes it."""
    from diffusers import DDIMScheduler
    from diffusers.loaders.single_file_utils import _legacy_load_scheduler

    state = load_file(folders / "sd2.safetensors")
    torch.save({"state_dict": state, "global_step": step, "epoch": 3}, path := tmp_path / "sd2.ckpt")
    theirs = _legacy_load_scheduler(DDIMScheduler, {**state, "global_step": step}, "scheduler").config.prediction_type
    assert {"eps": "epsilon", "v": "v_prediction"}[inspect(path).trained.prediction or ""] == theirs
    state[SPREAD_IN_FILE] = torch.linspace(-1, 1, 64) * (1.0 if step == 875_000 else 0.05)
    torch.save({"state_dict": state, "global_step": step}, path)
    with pytest.raises(BadCheckpoint, match=r"contradicts itself: it predicts (eps|v) by the spread"):
        inspect(path)


def test_the_step_in_a_file_of_tensors(folders: Path, tmp_path: Path) -> None:
    for step, prediction in ((875_000, "eps"), (110_000, "v")):
        for bare in (False, True):
            step_tensor = {"global_step": torch.tensor(step), "betas": torch.linspace(1e-4, 0.02, 1000)}
            found = inspect(marked(folders, "sd2", tmp_path / "sd2.safetensors", step_tensor, bare=bare))
            assert (found.trained.prediction, found.noise) == (prediction, NoiseScheduleSpec(kind="linear"))


def test_metadata_of_the_branches(folders: Path, tmp_path: Path) -> None:
    for metadata, prediction in (
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "eps"),
        ({"ss_base_model_version": "sd_v2_v"}, "v"),
        ({"modelspec.predict_key": "epsilon"}, "eps"),
    ):
        found = inspect(marked(folders, "sd2", tmp_path / "sd2.safetensors", metadata=metadata))
        assert found.trained.prediction == prediction
        assert found.latent == ((4, 96, 96) if prediction == "v" else (4, 64, 64))
    merged = {"modelspec.architecture": "stable-diffusion-v2-768-v"}
    path = marked(folders, "xl", tmp_path / "xl.safetensors", metadata=merged)
    with pytest.raises(BadCheckpoint, match="a model which predicts v and takes text 1024 wide, not 2048"):
        inspect(path)
    assert inspect(path, prediction="eps").trained.prediction == "eps"
    assert inspect(marked(folders, "xl", path, {"v_pred": EMPTY}, merged)).trained.prediction == "v"


def test_where_nothing_tells_it_is_refused(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "sd2", tmp_path / "sd2")
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), SPREAD_OF: torch.zeros(64)}, weights)
    for path in (folders / "sd2.safetensors", folder):
        with pytest.raises(BadCheckpoint, match=r"does not say what it predicts: Stable Diffusion 2\.x") as caught:
            inspect(path)
        assert "MEMBER.prediction=v" in caught.value.hint
    assert inspect(folders / "sd2.safetensors", prediction="v").latent == (4, 96, 96)
    assert inspect(folders / "sd2.safetensors", prediction="eps").latent == (4, 64, 64)
    config = json.loads((folder / "config.json").read_text())
    for side, prediction in ((96, "v"), (64, "eps")):
        (folder / "config.json").write_text(json.dumps({**config, "sample_size": side}))
        assert inspect(folder).trained.prediction == prediction


# --- noise


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_betas_of_a_buffer_are_told_by_their_formula(kind: str, zero: bool, dtype: torch.dtype) -> None:
    from diffusers import DDIMScheduler

    ends = (1e-4, 0.02) if kind == "linear" else (0.00085, 0.012)
    theirs = DDIMScheduler(1000, *ends, kind, rescale_betas_zero_snr=zero).betas
    names = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "squared-cosine"}
    found = noise_of(theirs.to(dtype).double().numpy(), "x")
    assert (found.kind, found.zero_terminal_snr) == (names[kind], zero)
    assert abs(betas_of(found) - theirs.double().numpy()).max() < 2e-5
    if kind != "squaredcos_cap_v2":
        assert (found.beta_start, found.beta_end) == ends


def test_buffers_of_single_files(folders: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    plain, rescaled = (
        DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=zero) for zero in (False, True)
    )
    sigmas = (1 / plain.alphas_cumprod - 1).sqrt()
    path = tmp_path / "xl.safetensors"
    for tensors, want in (
        ({"betas": plain.betas, "alphas_cumprod": plain.alphas_cumprod}, SD_NOISE),
        ({"alphas_cumprod": plain.alphas_cumprod}, SD_NOISE),
        ({"denoiser.sigmas": sigmas.flip(0)}, SD_NOISE),
        ({"alphas_cumprod": torch.zeros(3)}, None),  # of no schedule
    ):
        assert inspect(marked(folders, "xl", path, tensors)).noise == want
    for tensors in (
        {"betas": rescaled.betas},
        {"betas": plain.betas, "alphas_cumprod": rescaled.alphas_cumprod},
        {"alphas_cumprod": rescaled.alphas_cumprod},
    ):
        found = inspect(marked(folders, "xl", path, {**tensors, "v_pred": EMPTY})).trained
        assert found.noise is not None
        assert found.noise.zero_terminal_snr
        assert found.zero_snr
    odd = {"betas": torch.logspace(-4, -2, 1000)}
    with pytest.raises(BadCheckpoint, match="neither linear") as caught:
        inspect(marked(folders, "xl", path, odd))
    assert "MEMBER.noise=" in caught.value.hint
    assert inspect(path, noise="scaled-linear").noise == SD_NOISE


# --- options


def test_options_say_the_conventions_of_every_family(folders: Path, tmp_path: Path) -> None:
    save_file(published_state(), dit := tmp_path / "dit.safetensors")
    ldm_checkpoint(ldm := tmp_path / "ldm.safetensors")
    uvit_checkpoint(uvit := tmp_path / "uvit.pth")
    diffusers_folder(dit_folder := tmp_path / "dit", heads=2, layers=1)
    given: dict[str, Scalar] = {"prediction": "v", "noise": "scaled-linear:0.001:0.02:500", "zero_snr": True}
    want = NoiseScheduleSpec(kind="scaled-linear", steps=500, beta_start=0.001, beta_end=0.02, zero_terminal_snr=True)
    for family, path, more in (
        ("unet-sd", folders / "sd.safetensors", {}),
        ("unet-sd", folders / "sd", {}),
        ("unet-sdxl", folders / "xl", {}),
        ("dit", dit, {"num_heads": 4}),
        ("dit", dit_folder, {}),
        ("ldm", ldm, {"num_heads": 2, "size": 8}),
    ):
        found = open_family(family).inspect(path, {**given, **more})
        assert (found.parametrisation, found.noise) == ("v", want)
        assert found.trained.because == "the option prediction"
    more = {"num_heads": 4, "time": "discrete"}
    assert open_family("uvit").inspect(uvit, {**more, "prediction": "x0"}).parametrisation == "x0"


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"prediction": "flow"}, BadInput, "flow matching is not supported yet"),
        ({"prediction": "w"}, UnknownName, "unknown prediction type 'w'; known: eps, v, x0, flow"),
        ({"noise": "sigmoid"}, UnknownName, "unknown kind of noise 'sigmoid'"),
        ({"noise": "linear:0.1"}, BadInput, "allowed is KIND, or KIND:BETA_START:BETA_END"),
        ({"noise": "linear:0.1:0.01"}, BadInput, "0 < beta_start <= beta_end < 1"),
        ({"noise": "linear:a:b"}, BadInput, "noise is 'linear:a:b'"),
    ],
)
def test_options_that_can_not_be(
    options: dict[str, Scalar], kind: type[TStitchError], words: str, folders: Path
) -> None:
    with pytest.raises(kind, match=words):
        inspect(folders / "sd", **options)


def test_a_build_plans_with_what_is_said(folders: Path, tmp_path: Path) -> None:
    """The small member is a marked file, the large one has an option and no scheduler."""
    small = marked(folders, "sd", tmp_path / "small.safetensors", {"v_pred": EMPTY, "ztsnr": EMPTY})
    recipe = text_recipe(tmp_path / "pair.toml")
    plan = planned(
        recipe,
        members={"small": small, "large": folders / "sd"},
        options={"large.prediction": "x0", "large.zero_snr": "false"},
    ).conventions
    assert (plan.members["small"].parametrisation, plan.members["large"].parametrisation) == ("v", "x0")
    zero = replace(SD_NOISE, zero_terminal_snr=True)
    assert (plan.noise, plan.members["small"].noise, plan.members["large"].noise) == (SD_NOISE, zero, None)
    assert any("predicts v, as its marker tensor v_pred says" in note for note in plan.notes)
    assert any("predicts x0, as the option prediction says" in note for note in plan.notes)
    with pytest.raises(BadCheckpoint) as caught:
        planned(recipe, members={"small": folders / "sd2.safetensors", "large": folders / "sd"})
    assert "--option small.prediction=v" in caught.value.hint


# --- a scheduler beside the weights


def test_a_scheduler_and_a_marker_that_disagree(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "xl", tmp_path / "xl/unet")
    (tmp_path / "xl/scheduler").mkdir()
    file = tmp_path / "xl/scheduler/scheduler_config.json"
    weights = tmp_path / "xl/unet/diffusion_pytorch_model.safetensors"
    save_file({**load_file(weights), "v_pred": EMPTY, "ztsnr": EMPTY}, weights)
    base = {**PNDM, "_class_name": "EulerDiscreteScheduler"}
    for changes, words in (
        ({}, "eps by its scheduler_config.json and v by its marker tensor v_pred"),
        ({"prediction_type": "v_prediction"}, "zero_snr is False by its scheduler_config.json and True by its marker"),
    ):
        file.write_text(json.dumps({**base, **changes}))
        with pytest.raises(BadCheckpoint, match=words):
            inspect(tmp_path / "xl")
    said = inspect(tmp_path / "xl", prediction="v", zero_snr=True)
    assert said.scheduler is not None
    assert said.scheduler["rescale_betas_zero_snr"] is True
    file.write_text(json.dumps({**base, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    assert inspect(tmp_path / "xl").trained.zero_snr


# --- training states


def dit_state(path: Path, args: dict[str, Any] | None, state: dict[str, Any] | None = None, **more: Any) -> Path:
    content = {"ema": state or published_state(), **more}
    torch.save(content if args is None else {**content, "args": argparse.Namespace(**args)}, path)
    return path


DIT_ARGS = {"model": "DiT-T/2", "image_size": 64, "num_classes": 5, "vae": "ema", "epochs": 1400}


def test_a_training_state_of_a_dit(tmp_path: Path) -> None:
    found = open_family("dit").inspect(dit_state(tmp_path / "x.pt", DIT_ARGS, train_steps=7), {"num_heads": 4})
    assert (found.trained.prediction, found.trained.noise) == (None, None)
    assert found.trained.notes == ("was trained on latents of the autoencoder ema, as args.vae says",)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}, "a training state of SiT or a rel"),
        ({"path_type": "VP", "prediction": "noise"}, "as args.path_type = VP says"),
        ({"model": "SiT-XL/2"}, "args.model is 'SiT-XL/2', and it has the tensors of a DiT"),
        ({"model": "LightningDiT-XL/1"}, "it has the tensors of a DiT"),
        ({"model": "models.MDTv2-S/2"}, "it has the tensors of a DiT"),
        ({"prediction": "velocity"}, r"the velocity of a flow, as its training state \(args.prediction = velocity\)"),
        ({"objective": "rectified_flow"}, "the velocity of a flow"),
        ({"prediction": "score"}, "predicts 'score'"),
        ({"image_size": 48}, r"args.image_size is 48, and its latent is 8 wide, for pictures of 8 or 32 or 64"),
        ({"num_classes": 1000}, "args.num_classes is 1000, and its label table has 6 rows"),
        ({"interpolant": "linear"}, "as args.interpolant = linear says"),
        ({"loss": "flow_matching"}, "the velocity of a flow"),
        ({"noise_scheduler": "FlowMatchEulerDiscreteScheduler"}, "the velocity of a flow"),
        ({"noise_schedule": "sigmoid"}, "noise that can't be expressed, .*sigmoid.*: known are linear, scaled_linear"),
        ({"beta_schedule": "linear", "beta_start": 2, "beta_end": 1}, "noise that can't be expressed"),
        ({"learn_sigma": False}, "args.learn_sigma is False, and its last layer has an output for the variance"),
    ],
)
def test_training_states_of_other_models(args: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        open_family("dit").inspect(dit_state(tmp_path / "x.pt", {**DIT_ARGS, **args}), {"num_heads": 4})


class _Node:
    """Pickled as OmegaConf's own are: a value under ``_val``, nodes under ``_content``, the node above them."""

    def __init__(self, value: Any, parent: _Node | None = None) -> None:
        self._parent = parent
        if isinstance(value, dict):
            self._content = {key: _Node(inner, self) for key, inner in value.items()}
        else:
            self._val = value


@pytest.mark.parametrize("name", ["omegaconf.dictconfig.DictConfig", "types.SimpleNamespace"])
def test_settings_of_other_libraries_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, last = name.rpartition(".")
    settings: Any = SimpleNamespace(transport=SimpleNamespace(path_type="Linear"))
    if last == "DictConfig":
        for each in ("omegaconf", module):
            monkeypatch.setitem(sys.modules, each, ModuleType(each))
        made = type(last, (_Node,), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], last, made, raising=False)
        monkeypatch.setattr(sys.modules[__name__], "_Node", made)
        settings = made({"transport": {"path_type": "Linear"}})
    path = dit_state(tmp_path / "x.pt", None, config=settings)
    with pytest.raises(BadCheckpoint, match=r"of SiT or a relative of it .* as config\.transport\.path_type = Linear"):
        open_family("dit").inspect(path, {"num_heads": 4})


@pytest.mark.parametrize(
    ("args", "null"),
    [({"num_classes": 5}, True), ({"num_classes": 6}, False), ({"class_dropout_prob": 0.0}, False), ({}, True)],
)
def test_the_null_class_of_a_training(args: dict[str, Any], null: bool, tmp_path: Path) -> None:
    """The label table has six rows. Without dropped labels the last one is a class, and nothing to guide with."""
    path = dit_state(tmp_path / "x.pt", args)
    assert open_family("dit").inspect(path, {"num_heads": 4}).null_class is null
    assert open_family("dit").inspect(path, {"num_heads": 4, "null_class": not null}).null_class is not null


def test_a_label_table_of_one_row_has_no_null_class(tmp_path: Path) -> None:
    path = dit_state(tmp_path / "x.pt", None, published_state(classes=0))
    plan = planned("dit", members={"small": path, "large": path}, options={"small.num_heads": 4, "large.num_heads": 4})
    assert (plan.recipe.conditioning.classes, plan.recipe.conditioning.null) == (1, None)


@pytest.mark.parametrize(
    ("args", "prediction", "noise"),
    [
        ({"predict_xstart": True}, "x0", None),
        ({"predict_v": True, "noise_schedule": "cosine"}, "v", NoiseScheduleSpec(kind="squared-cosine")),
        ({"parameterization": "v", "results_dir": "/home/x/flow_matching/results"}, "v", None),
        (
            {"noise_schedule": "linear", "diffusion_steps": 4000},
            None,
            NoiseScheduleSpec(kind="linear", steps=4000, beta_start=2.5e-5, beta_end=0.005),
        ),
        ({"diffusion_steps": 500}, None, NoiseScheduleSpec(kind="linear", steps=500, beta_start=2e-4, beta_end=0.04)),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, None, SD_NOISE),
        ({"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}, None, SD_NOISE),
        ({"noise_schedule": "cosine", "timesteps": 250}, None, NoiseScheduleSpec(kind="squared-cosine")),
        ({"beta_schedule": "linear"}, None, None),
        ({"objective": "pred_noise", "noise_schedule": "linear"}, "eps", NoiseScheduleSpec(kind="linear")),
    ],
)
def test_what_a_training_state_says(
    args: dict[str, Any], prediction: str, noise: NoiseScheduleSpec | None, tmp_path: Path
) -> None:
    for key in ("args", "config", "hyper_parameters"):
        torch.save({"state_dict": published_state(), key: {"model": args}}, path := tmp_path / "x.pt")
        found = open_family("dit").inspect(path, {"num_heads": 4})
        assert (found.parametrisation, found.noise) == (prediction, noise)


def test_marks_and_metadata_beside_a_state_dict(folders: Path, tmp_path: Path) -> None:
    """Of a file of tensors that a program has saved again as a training state."""
    state = load_file(folders / "xl.safetensors")
    for more in (
        {"v_pred": EMPTY, "ztsnr": EMPTY},
        {"metadata": {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}},
        {"metadata": {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": True}},
    ):
        torch.save({"state_dict": state, **more}, path := tmp_path / "xl.ckpt")
        found = inspect(path).trained
        assert (found.prediction, found.zero_snr) == ("v", True)


def test_a_dit_without_learned_variance_is_noted(tmp_path: Path) -> None:
    """The published ones have one, and others that predict a velocity may not: only the recipe says what it is."""
    from tstitch_export.families.dit.config import DiTConfig
    from tstitch_export.families.dit.model import DiT

    config = DiTConfig(depth=1, width=32, heads=4, patch=2, size=8, channels=4, classes=5)
    save_file(DiT(config).initialise().state_dict(), path := tmp_path / "x.safetensors")
    options: dict[str, Scalar] = {f"{name}.num_heads": 4 for name in ("small", "large")}
    members = {"small": path, "large": path}
    notes = planned("dit", members=members, options=options).conventions.notes
    assert sum("has no learned variance, as the published DiTs have, and does not say" in note for note in notes) == 2
    assert any("--option small.prediction=..." in note for note in notes)
    said = {**options, "small.prediction": "eps", "large.prediction": "v"}
    notes = planned("dit", members=members, options=said).conventions.notes
    assert not any("learned variance" in note for note in notes)


def test_a_state_dict_of_sit_is_told_by_what_it_never_trained(tmp_path: Path) -> None:
    """SiT's published files are state dicts with DiT's names and shapes. Its forward pass drops half of the outputs,
    so that they get no gradient: one step of training from DiT's zeros shows it."""
    from support.dits import published_model
    from tstitch_export.families.dit.model import DiT

    model = DiT(published_model().config).initialise().requires_grad_(True)
    assert not model.final_layer.linear.weight.any()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    x = torch.randn(2, 4, 8, 8)
    for _ in range(3):
        optimiser.zero_grad()
        velocity, _ = model(x, torch.rand(2), torch.tensor([0, 1])).chunk(2, dim=1)
        ((velocity - x) ** 2).mean().backward()
        optimiser.step()
    save_file(model.state_dict(), path := tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match="a learned variance that were never trained") as caught:
        open_family("dit").inspect(path, {"num_heads": 4})
    assert "MEMBER.prediction=eps" in caught.value.hint
    assert open_family("dit").inspect(path, {"num_heads": 4, "prediction": "eps"}).parametrisation == "eps"
    diffusers_folder(tmp_path / "dit", layers=1)
    weights = tmp_path / "dit/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    for key in ("proj_out_2.weight", "proj_out_2.bias"):
        state[key].unflatten(0, (4, 2, 4))[:, 1] = 0
    save_file(state, weights)
    with pytest.raises(BadCheckpoint, match=r"never trained \(rows of zeros in proj_out_2\)"):
        open_family("dit").inspect(tmp_path / "dit", {})
    save_file(published_state(), tmp_path / "SiT-XL-2-256x256.safetensors")
    with pytest.raises(BadCheckpoint, match="its name sounds like flow"):
        open_family("dit").inspect(tmp_path / "SiT-XL-2-256x256.safetensors", {"num_heads": 4})
