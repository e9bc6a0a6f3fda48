"""Where the parts of a bundle are found, and what a bundle without them takes and gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_checkpoints import MEMBER, SD, pieces, planned, said, single_file, text_recipe
from support.tiny_families import clip_text_folder, controlnet_folder, unet_folder
from tstitch_engines.bundle.manifest import TextInputs


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pieces(tmp_path_factory.mktemp("whole") / "sd", **SD)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_recipe(tmp_path_factory.mktemp("recipe") / "pair.toml")


def test_bare_unets_take_embeddings_and_give_latents(recipe: Path, sd: Path) -> None:
    """Also the folder ``unet`` of a pipeline, whose neighbours are not looked at."""
    plan = planned(recipe, members={"small": sd / "unet", "large": sd / "unet"})
    assert not plan.parts
    assert plan.conventions.decoder.kind == "none"
    said(plan, "member 'small' has no text_encoder: it takes prompt_embeds [N,T,32] in place of prompts", "--part")
    said(plan, "there is no vae_decoder: the bundle gives latents, not pictures")
    assert plan.conventions.members["large"].text == TextInputs(hidden=(), width=32)


def test_bare_sdxl_takes_pooled_embeddings_too(tmp_path: Path) -> None:
    unet_folder(tmp_path / "xl", "sdxl", part=None)
    recipe = text_recipe(tmp_path / "xl.toml", family="unet-sdxl", xl=True)
    plan = planned(recipe, members={"small": tmp_path / "xl", "large": tmp_path / "xl"})
    said(plan, "has no text_encoder and text_encoder_2", "prompt_embeds [N,T,64] and pooled_prompt_embeds [N,16]")
    text = plan.conventions.members["small"].text
    assert text is not None
    assert (text.hidden, text.pooled, text.pooled_width, text.time_ids) == ((), None, 16, "sizes")


def test_parts_come_from_the_last_member_that_has_them(recipe: Path, sd: Path, tmp_path: Path) -> None:
    plan = planned(recipe, members={"small": sd, "large": sd / "unet"})
    assert {name: part.given for name, part in plan.parts.items()} == {
        "text_encoder": sd / "text_encoder", "vae_decoder": sd / "vae", "vae_encoder": sd / "vae",
    }  # fmt: skip
    other = shutil.copytree(sd, tmp_path / "other")
    plan = planned(recipe, members={"small": sd, "large": other})
    assert plan.parts["vae_decoder"].given == other / "vae"
    assert set(plan.parts) == {"text_encoder", "vae_decoder", "vae_encoder"}, "equal text encoders are one"


def test_a_text_encoder_given_goes_before_those_of_the_pipelines(recipe: Path, sd: Path, tmp_path: Path) -> None:
    clip_text_folder(tmp_path / "tuned", layers=2)
    both, tuned = {"small": sd, "large": sd}, tmp_path / "tuned/text_encoder"
    plan = planned(recipe, members=both, parts={"text_encoder": tuned})
    assert plan.parts["text_encoder"].given == tuned
    assert "small_text_encoder" not in plan.parts
    plan = planned(recipe, members=both, parts={"small_text_encoder": tuned})
    assert (plan.parts["small_text_encoder"].given, plan.parts["text_encoder"].given) == (tuned, sd / "text_encoder")
    assert plan.conventions.members["small"].text == TextInputs(hidden=("small_text_encoder",), width=32)
    assert plan.conventions.members["large"].text == TextInputs(hidden=("text_encoder",), width=32)


def test_a_whole_pipeline_as_a_part_is_asked_for_that_part(tmp_path: Path) -> None:
    clip_text_folder(tmp_path / "xl")
    clip_text_folder(tmp_path / "xl", "text_encoder_2", projection=16)
    unet_folder(tmp_path / "xl", "sdxl")
    recipe = text_recipe(tmp_path / "xl.toml", family="unet-sdxl", xl=True)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2"), tmp_path / "xl")
    unet = tmp_path / "xl/unet"
    plan = planned(recipe, members={"small": unet, "large": unet}, parts=parts)
    assert [plan.parts[name].inspection.path.name for name in parts] == list(parts)


def test_precisions_of_parts(recipe: Path, sd: Path, tmp_path: Path) -> None:
    controlnet_folder(tmp_path / "control")
    given: dict[str, Any] = {"members": {"small": sd, "large": sd}, "parts": {"controlnet": tmp_path / "control"}}

    def found(precision: Any) -> dict[str, str]:
        return {network.name: network.precision for network in planned(recipe, **given, precision=precision).networks}

    half = {"small": "fp16", "large": "fp16", "controlnet": "fp16"}
    assert found("fp16") == {**half, "text_encoder": "fp16", "vae_decoder": "fp32", "vae_encoder": "fp32"}
    assert found({"small": "fp16", "large": "fp16"}) == {
        **half, "text_encoder": "fp32", "vae_decoder": "fp32", "vae_encoder": "fp32",
    }, "a ControlNet has its members' precision"  # fmt: skip
    assert found({"vae_decoder": "bf16"})["vae_decoder"] == "bf16"


def test_a_controlnet_controls_the_members_that_it_fits(recipe: Path, sd: Path, tmp_path: Path) -> None:
    controlnet_folder(tmp_path / "control")
    unet_folder(tmp_path / "deep", layers_per_block=2, part=None)
    parts = {"controlnet": tmp_path / "control"}
    plan = planned(recipe, members={"small": sd, "large": sd}, parts=parts)
    assert all(member.inspection.controlled for member in plan.members)
    assert not any("control" in note for note in plan.conventions.notes)
    members = {"small": tmp_path / "deep", "large": sd}
    plan = planned(recipe, members=members, parts=parts, options={"small.controlled": "no"})
    assert [member.inspection.controlled for member in plan.members] == [False, True]
    said(plan, "member 'small' (deep) is not controlled: its steps run without the control picture")


def test_a_controlnet_leaves_other_families_alone(sd: Path, tmp_path: Path) -> None:
    """The option ``controlled`` is given to families that have it alone; here the recipe has no such part."""
    from support.dits import diffusers_folder

    diffusers_folder(tmp_path / "dit", layers=1)
    more = f"[members.small]\n{MEMBER.format(family='dit')}"
    recipe = text_recipe(tmp_path / "mixed.toml", members=("large",), more=more)
    controlnet_folder(tmp_path / "control")
    with pytest.raises(Exception, match="differ in their conditioning"):
        planned(recipe, members={"small": tmp_path / "dit", "large": sd}, parts={"controlnet": tmp_path / "control"})


def test_parts_within_a_single_file(recipe: Path, tmp_path: Path) -> None:
    """A text encoder there has no tokenizer beside it: without one it is left out."""
    file = single_file(tmp_path / "sd.safetensors")
    both = {"small": file, "large": file}
    plan = planned(recipe, members=both)
    assert {name: part.given for name, part in plan.parts.items()} == {"vae_decoder": file, "vae_encoder": file}
    said(plan, "the text_encoder in sd.safetensors is left out", "no tokenizer", "--option text_encoder.tokenizer=DIR")
    said(plan, "member 'small' has no text_encoder: it takes prompt_embeds [N,T,768]")
    assert plan.conventions.latent.scaling == 0.18215
    tokenizer = {"text_encoder.tokenizer": str(tmp_path / "parts/tokenizer")}
    plan = planned(recipe, members=both, options=tokenizer)
    assert set(plan.parts) == {"text_encoder", "vae_decoder", "vae_encoder"}
    assert not any("text_encoder" in note for note in plan.conventions.notes)
    assert plan.parts["text_encoder"].inspection.layout == "single-file"


def test_a_single_file_of_a_unet_alone(recipe: Path, tmp_path: Path) -> None:
    file = single_file(tmp_path / "unet.safetensors", text=False, vae=False)
    plan = planned(recipe, members={"small": file, "large": file})
    assert not plan.parts
    assert not any("left out" in note for note in plan.conventions.notes)


def test_two_single_files_keep_their_own_text_encoders(recipe: Path, tmp_path: Path) -> None:
    """One tokenizer serves both; a textual inversion is for the one that it was given for."""
    files = [single_file(tmp_path / name / "sd.safetensors") for name in ("a", "b")]
    state = load_file(files[0])
    state["cond_stage_model.transformer.text_model.final_layer_norm.bias"] += 1
    save_file(state, files[0])
    tokenizer = {"text_encoder.tokenizer": str(tmp_path / "a/parts/tokenizer")}
    plan = planned(recipe, members={"small": files[0], "large": files[1]}, options=tokenizer)
    assert (plan.parts["small_text_encoder"].given, plan.parts["text_encoder"].given) == (files[0], files[1])
    save_file({"<cat>": torch.zeros(2, 768)}, tmp_path / "cat.safetensors")
    options = {**tokenizer, "text_encoder.textual_inversion": str(tmp_path / "cat.safetensors")}
    plan = planned(recipe, members={"small": files[0], "large": files[1]}, options=options)
    assert {name: bool(plan.parts[name].inspection.inversions) for name in plan.parts if "text" in name} == {
        "small_text_encoder": False, "text_encoder": True,
    }  # fmt: skip


def test_an_autoencoder_that_can_not_be_read_is_left_out_of_a_single_file(recipe: Path, tmp_path: Path) -> None:
    file = single_file(tmp_path / "sd.safetensors", text=False)
    state = load_file(file)
    del state["first_stage_model.encoder.conv_in.weight"]
    save_file(state, file)
    plan = planned(recipe, members={"small": file, "large": file})
    said(plan, "the vae_decoder in sd.safetensors is left out", "lacks first_stage_model.encoder.conv_in.weight")
    assert plan.conventions.decoder.kind == "none"
