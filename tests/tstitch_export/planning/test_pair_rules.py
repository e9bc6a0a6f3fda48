"""What can't be stitched is refused before anything is exported, with the values that differ: a test for each rule.

Those that members conditioned by classes can break are in ``test_compatibility.py`` too, over whole ``build`` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.dits import diffusers_folder
from support.tiny_checkpoints import MEMBER, SD, pieces, planned, text_recipe
from support.tiny_families import clip_text_folder, controlnet_folder, lora_file, unet_folder, vae_folder
from tstitch_engines.errors import BadCheckpoint, BadInput, PairMismatch, TStitchError, UnknownName
from tstitch_engines.spec import Range


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion pipeline."""
    return pieces(tmp_path_factory.mktemp("whole") / "sd", **SD)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return text_recipe(tmp_path / "pair.toml")


def refused(
    recipe: Path, small: Path, large: Path, *words: str, kind: type[TStitchError] = PairMismatch, **more: Any
) -> str:
    """Returns the hint."""
    with pytest.raises(kind) as caught:
        planned(recipe, members={"small": small, "large": large}, **more)
    for part in words:
        assert part in caught.value.message, caught.value.message
    assert caught.value.hint
    return caught.value.hint


def classes(path: Path, *, size: int = 8, null: int = 5) -> Path:
    """A recipe for DiTs of 5 classes."""
    member = MEMBER.format(family="dit")
    path.write_text(
        f'name = "pair"\ndescription = ""\n[latent]\nchannels = 4\nheight = {size}\nwidth = {size}\n'
        f'[noise]\nkind = "linear"\n[conditioning]\nclasses = 5\nnull = {null}\n[defaults]\n'
        f'[decoder]\nkind = "none"\n[members.small]\n{member}[members.large]\n{member}'
    )
    return path


def dit(folder: Path, *, count: int = 5) -> Path:
    diffusers_folder(folder, layers=1, classes=count)
    return folder


# --- the latent


def test_latent_channels(recipe: Path, sd: Path, tmp_path: Path) -> None:
    other = pieces(tmp_path / "other", in_channels=8, out_channels=8)
    hint = refused(recipe, other, sd, "number of latent channels", "small (unet) has 8", "large (unet) has 4")
    assert "train both on the same latent space" in hint
    refused(recipe, other, other, "has the latent 8x8x8; recipe 'pair' is for 4x8x8")


def test_a_fixed_size_that_is_not_the_recipes(tmp_path: Path) -> None:
    text = classes(tmp_path / "fixed.toml", size=16)
    path = dit(tmp_path / "dit")
    refused(text, path, path, "has the latent 4x8x8; recipe 'pair' is for 4x16x16")


def test_sizes_in_pixels(recipe: Path, sd: Path, tmp_path: Path) -> None:
    plan = planned(recipe, members={"small": sd, "large": sd})

    def sizes(**sides: Any) -> Any:
        return plan.sizes(**{"batch": Range(1, 2, 2), "height": None, "width": None, "tokens": None, **sides})

    assert sizes(height=Range(64, 128, 256)).height == Range(8, 16, 32)
    with pytest.raises(BadInput, match="height 60:64:64: 60 is not a multiple of 8 pixels"):
        sizes(height=Range(60, 64, 64))
    with pytest.raises(BadInput, match="takes latent widths in steps of 2 up to 8192, not 9"):
        plan.members[0].profile(sizes(width=Range(72, 80, 80)))
    path = dit(tmp_path / "dit")
    plan = planned(classes(tmp_path / "fixed.toml"), members={"small": path, "large": path})
    with pytest.raises(
        BadInput, match=r"height 8:16:16 was asked for, and member small takes 8 pixels alone"
    ) as caught:
        sizes(height=Range(8, 16, 16))
    assert "leave out --height" in caught.value.hint
    assert sizes(height=Range(8, 8, 8)).height == Range(8, 8, 8)


def test_shifted_latents(recipe: Path, sd: Path, tmp_path: Path) -> None:
    shifted = pieces(tmp_path / "shifted", vae={"shift_factor": 0.25})
    hint = refused(recipe, shifted, sd, "latent shift", "small (unet) has 0.25", "large (unet) has 0")
    assert "only a scale can be adapted" in hint


# --- conditioning


def test_class_members_among_text_members(sd: Path, tmp_path: Path) -> None:
    more = f"[members.small]\n{MEMBER.format(family='dit')}"
    mixed = text_recipe(tmp_path / "mixed.toml", members=("large",), more=more)
    refused(
        mixed,
        dit(tmp_path / "dit"),
        sd,
        "differ in their conditioning",
        "small (dit) has class labels",
        "large (unet) has text",
    )


def test_a_recipe_of_another_kind(sd: Path, tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path / "classes.toml", conditioning="classes = 5\nnull = 5")
    hint = refused(recipe, sd, sd, "is conditioned by text; recipe 'pair' is for class labels")
    assert "build --list" in hint


def test_labels_and_null_class(tmp_path: Path) -> None:
    five, seven = (dit(tmp_path / str(n), count=n) for n in (5, 7))
    recipe = classes(tmp_path / "five.toml")
    refused(recipe, five, seven, "number of labels", "small (5) has 6, large (7) has 8")
    hint = refused(recipe, seven, seven, "has 8 labels; recipe 'pair' has 6: 5 classes and the null class 5")
    assert "use the recipe dit: tstitch-trt build dit --member small=" in hint
    hint = refused(
        classes(tmp_path / "null.toml", null=3), five, five, "has the null class 3; a model's is the last label, 5"
    )
    assert hint == "write null = 5"


def test_text_of_another_width_than_the_shared_encoder(recipe: Path, sd: Path, tmp_path: Path) -> None:
    unet_folder(tmp_path / "wide", cross_attention_dim=64, part=None)
    hint = refused(
        recipe, tmp_path / "wide", sd,
        "member 'small' (wide) takes text of width 64; its encoders give part 'text_encoder' (text_encoder) 32",
    )  # fmt: skip
    assert "--part small_text_encoder=FOLDER" in hint
    assert "pass prompt_embeds" in hint


def test_pooled_text_of_another_width(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path / "xl.toml", family="unet-sdxl", xl=True)
    unet_folder(tmp_path / "xl", "sdxl")
    clip_text_folder(tmp_path / "xl")
    clip_text_folder(tmp_path / "xl", "text_encoder_2", projection=24)
    hint = refused(recipe, tmp_path / "xl", tmp_path / "xl", "takes a pooled text of width 16", "gives 24")
    assert "with projection" in hint
    clip_text_folder(tmp_path / "none", "text_encoder_2", width=32)
    parts = {"text_encoder_2": tmp_path / "none/text_encoder_2"}
    refused(recipe, tmp_path / "xl", tmp_path / "xl", "takes a pooled text of width 16", "gives 0", parts=parts)


# --- autoencoders


@pytest.mark.parametrize(
    ("changes", "words", "hint"),
    [
        ({"latent_channels": 8}, "has latents of 8 channels; the members' have 4", "--part vae_decoder=FOLDER"),
        ({"shift_factor": 0.5}, "shifts its latents by 0.5; the members' are by 0", "vae_decoder.shift=0"),
        ({"scaling_factor": 0.13025}, "scales its latents by 0.13025; the members' are by 0.18215",
         "if it is the same one: --option vae_decoder.scaling=0.18215"),
    ],
)  # fmt: skip
def test_another_autoencoder(changes: Any, words: str, hint: str, recipe: Path, sd: Path, tmp_path: Path) -> None:
    vae_folder(tmp_path / "vae", levels=4, **changes)
    assert hint in refused(recipe, sd, sd, "part 'vae_decoder' (vae)", words, parts={"vae_decoder": tmp_path / "vae"})


def test_the_scale_of_an_autoencoder_can_be_said(recipe: Path, sd: Path, tmp_path: Path) -> None:
    vae_folder(tmp_path / "vae", levels=4, scaling_factor=0.5)
    found = planned(
        recipe,
        members={"small": sd, "large": sd},
        parts={"vae_decoder": tmp_path / "vae"},
        options={"vae_decoder.scaling": "0.18215"},
    )
    assert found.parts["vae_decoder"].inspection.config["scaling"] == 0.18215


def test_halves_and_controlnet_of_other_factors(recipe: Path, sd: Path, tmp_path: Path) -> None:
    vae_folder(tmp_path / "vae", levels=3, scaling_factor=0.18215)
    words = ("part 'vae_decoder' (vae) 4", "part 'vae_encoder' (vae) 8")
    refused(recipe, sd, sd, "differ in the pixels", *words, parts={"vae_decoder": tmp_path / "vae"})
    controlnet_folder(tmp_path / "control", conditioning_embedding_out_channels=(8, 16, 32))
    words = ("part 'vae_decoder' (vae) 8", "part 'controlnet' (control) 4")
    refused(recipe, sd, sd, "differ in the pixels", *words, parts={"controlnet": tmp_path / "control"})


# --- ControlNet


def test_a_controlnet_that_does_not_fit(recipe: Path, sd: Path, tmp_path: Path) -> None:
    controlnet_folder(tmp_path / "control", layers_per_block=2)
    hint = refused(
        recipe, sd, sd, "part 'controlnet' (control) can't control member 'small' (unet)", "takes 5 residuals",
        "gives 7", parts={"controlnet": tmp_path / "control"},
    )  # fmt: skip
    assert "--option small.controlled=false" in hint
    controlnet_folder(tmp_path / "wide", cross_attention_dim=64)
    refused(recipe, sd, sd, "unet takes text of width 32, wide 64", parts={"controlnet": tmp_path / "wide"})


def test_controlled_members_without_a_controlnet(recipe: Path, sd: Path) -> None:
    hint = refused(
        recipe, sd, sd, "takes the residuals of a ControlNet, and there is none", options={"large.controlled": True}
    )
    assert "--part controlnet=FOLDER" in hint


def test_a_controlnet_that_controls_nothing(recipe: Path, sd: Path, tmp_path: Path) -> None:
    controlnet_folder(tmp_path / "control")
    off = {"small.controlled": "false", "large.controlled": "false"}
    parts = {"controlnet": tmp_path / "control"}
    hint = refused(recipe, sd, sd, "controls no member", options=off, parts=parts)
    assert "--option large.controlled=true" in hint


def test_a_controlnet_in_another_precision(recipe: Path, sd: Path, tmp_path: Path) -> None:
    controlnet_folder(tmp_path / "control")
    parts = {"controlnet": tmp_path / "control"}
    hint = refused(
        recipe, sd, sd, "is built in fp32 and member 'small' (unet) in fp16", parts=parts, precision={"small": "fp16"}
    )
    assert "--precision controlnet=fp16" in hint


# --- what was given


def test_a_lora_for_another_model(recipe: Path, sd: Path, tmp_path: Path) -> None:
    other = unet_folder(tmp_path / "other", block_out_channels=(64, 128))
    lora = lora_file(tmp_path / "style.safetensors", other)
    hint = refused(recipe, sd, sd, "style.safetensors", kind=BadCheckpoint, options={"large.lora": str(lora)})
    assert hint


def damaged(folder: Path) -> Path:
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    return folder


def missing(folder: Path) -> Path:
    return folder / "nowhere"


def empty(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (damaged, "it looks like a FluxTransformer2DModel"),
        (missing, "does not exist"),
        (empty, "it looks like a folder without config.json"),
    ],
)
def test_unknown_layouts_say_what_they_look_like(
    make: Callable[[Path], Path], words: str, recipe: Path, sd: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    refused(recipe, make(tmp_path / "other"), sd, words, kind=BadCheckpoint)


def test_names_of_parts_and_members(recipe: Path, sd: Path) -> None:
    text, both = sd / "text_encoder", {"small": sd, "large": sd}
    with pytest.raises(UnknownName, match="unknown part of recipe 'pair' 'text_encodr'"):
        planned(recipe, members=both, parts={"text_encodr": text})
    with pytest.raises(UnknownName, match="unknown part of recipe 'pair' 'text_encoder_2'"):
        planned(recipe, members=both, parts={"text_encoder_2": text})
    with pytest.raises(UnknownName, match="unknown part of recipe 'pair' 'base_text_encoder'"):
        planned(recipe, members=both, parts={"base_text_encoder": text})
    with pytest.raises(BadInput, match="member name 'my_vae_decoder' is not allowed: parts are called so"):
        planned(recipe, members={**both, "my_vae_decoder": sd})
    with pytest.raises(UnknownName, match="unknown member in precision 'vae_decodr'"):
        planned(recipe, members=both, precision={"vae_decodr": "fp16"})
