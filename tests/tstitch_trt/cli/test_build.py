"""``tstitch-trt build`` from recipes of one's own and with parts; ``build`` and ``inspect`` say what was adapted."""

from __future__ import annotations

from pathlib import Path

import pytest

import tstitch_trt
from support.command import Command, refused
from support.tiny import SHAPES, TinyPair
from support.tiny_checkpoints import PNDM, pieces
from support.tiny_families import clip_text_folder, kl_folder
from tstitch_export.planning.recipe import load_recipe, recipe_names


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_the_list_has_every_recipe(run: Command) -> None:
    table = run("build", "--list").out
    for entry in run("build", "--list", "--json").json:
        recipe = load_recipe(entry["name"])[0]
        assert (entry["description"], entry["members"]) == (recipe.description, list(recipe.members))
        assert entry["name"] in table
    assert "template" not in recipe_names()


def test_the_template_is_a_recipe_that_builds(run: Command, tmp_path: Path) -> None:
    """Two bare UNets without and then, on top of the same exports, with a text encoder."""
    outcome = run("build", "--template")
    assert (outcome.code, outcome.err) == (0, "")
    (tmp_path / "my.toml").write_text(outcome.out)
    recipe, _ = load_recipe(tmp_path / "my.toml")
    assert list(recipe.members) == ["small", "large"]
    assert recipe.other_members is not None

    unet = pieces(tmp_path / "sd", "least", seed=5, scheduler={**PNDM, "prediction_type": "v_prediction"})
    words = ["build", tmp_path / "my.toml", "--member", f"small={unet / 'unet'}", "--member", f"large={unet}"]
    bare = run(*words, "--batch", "1:1:2", "-o", tmp_path / "my.bundle")
    assert bare.code == 0, bare.err
    assert bare.out.strip() == str(tmp_path / "my.bundle")
    notes = (
        "member 'large' (unet) predicts v, as its scheduler_config.json says",
        "member 'small' has no text_encoder: it takes prompt_embeds [N,T,32] in place of prompts",
        "there is no vae_decoder: the bundle gives latents, not pictures",
    )
    shown = run("inspect", tmp_path / "my.bundle").out
    for note in notes:
        assert note in bare.err
        assert f"note       {note}" in shown

    clip_text_folder(tmp_path / "clip", layers=1)
    part = f"text_encoder={tmp_path / 'clip/text_encoder'}"
    whole = run(*words, "--batch", "1:1:2", "--part", part, "-o", tmp_path / "my.bundle", "--json")
    assert whole.code == 0, whole.err
    made = [line for line in whole.err.splitlines() if ": building" in line]
    assert all(line.startswith("part text_encoder: ") for line in made), "the rest was there"
    assert list(whole.json["parts"]) == ["text_encoder"]
    assert "no text_encoder" not in whole.err


def test_dits_of_any_size_need_no_recipe_of_their_own(run: Command, tiny_pair: TinyPair, tmp_path: Path) -> None:
    """4x8x8 latents, ten classes, and the picture's size by the VAE."""
    kl_folder(tmp_path / "vae")
    words = ["build", "dit", "--part", f"vae_decoder={tmp_path / 'vae'}", "-o", tmp_path / "dit.bundle"]
    for name in ("small", "large"):
        words += ["--member", f"{name}={tiny_pair.checkpoint(name)}"]
    told = run(*words)
    refused(told, "may have any number of attention heads", "--option small.num_heads=N")
    heads = [word for name in ("small", "large") for word in ("--option", f"{name}.num_heads={SHAPES[name]['heads']}")]
    made = run(*words, *heads, "--batch", "1:1:2", "--json")
    assert made.code == 0, made.err
    conditioning = made.json["conditioning"]
    assert (conditioning["classes"], conditioning["null"], made.json["decoder"]["factor"]) == (10, 10, 2)
    with tstitch_trt.load(tmp_path / "dit.bundle", threads=1) as runtime:
        assert runtime.sample(labels=[9], steps=2).images.shape == (1, 16, 16, 3)


def test_what_is_wrong_with_parts_and_sizes(run: Command, tmp_path: Path) -> None:
    unet = pieces(tmp_path / "sd", "bksdm")
    words = ["build", "sd15-bksdm-tiny", "--member", f"small={unet}", "--member", f"large={unet}", "-o", tmp_path / "o"]
    refused(run(*words, "--part", "text_encodr=x"), "unknown part of recipe", "did you mean 'text_encoder'")
    refused(run(*words, "--part", "controlnet"), "--part", "NAME=CHECKPOINT")
    refused(run(*words, "--height", "60"), "60 is not a multiple of 8")
    refused(run(*words, "--tokens", "9000"), "prompt lengths in tokens", "9000")
    refused(run(*words, "--part", f"vae_decoder={unet}"), "is no autoencoder")
    assert not (tmp_path / "o").exists()
