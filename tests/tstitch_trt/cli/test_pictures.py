"""``sample`` from text and from pictures, and what ``inspect`` says of such bundles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.command import Command, refused
from support.hand_made_parts import World
from support.pictures import read_metadata
from support.tiny import TinyPair


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return World().bundle(tmp_path_factory.mktemp("whole")).root


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def pictures(folder: Path, size: tuple[int, int] = (96, 64)) -> tuple[Path, Path]:
    """A picture and a mask of ``size`` (width, height)."""
    rng = np.random.default_rng(0)
    image, mask = folder / "photo.png", folder / "mask.png"
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(image)
    left = np.zeros((size[1], size[0]), np.uint8)
    left[:, : size[0] // 2] = 255
    Image.fromarray(left).save(mask)
    return image, mask


def shown(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_prompts_make_pictures_that_say_how_they_were_made(run: Command, bundle: Path, tmp_path: Path) -> None:
    outcome = run(
        "sample", bundle, "--prompt", "a red fox", "--prompt", "a bear", "--negative", "blurry", "-n", 3, "--size",
        "96x64", "--seed", 5, "--guidance", 3, "-o", tmp_path / "out", "--threads", 1, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    files = [Path(name) for name in outcome.json["files"]]
    assert [shown(file).shape for file in files] == [(64, 96, 3)] * 3
    settings = json.loads(read_metadata(files[2])["tstitch-trt"])
    assert (settings["prompt"], settings["seed"], settings["negative"]) == ("a red fox", 7, "blurry")
    assert settings["guidance"] == {"plain": [3.0], "steered": [3.0]}
    assert (settings["width"], settings["height"]) == (96, 64)
    with tstitch_trt.load(bundle, threads=1) as runtime:
        same = runtime.sample(
            prompt=["a red fox", "a bear"], negative_prompt="blurry", n=3, seed=5, width=96, height=64, guidance=3.0
        )
    assert same.images is not None
    np.testing.assert_array_equal(shown(files[1]), same.images[1])


def test_a_bundle_of_grey_pictures_starts_from_a_coloured_one(
    run: Command, fashion_bundle: Path, tmp_path: Path
) -> None:
    image, _ = pictures(tmp_path, (28, 28))
    latents = tmp_path / "latents.npy"
    outcome = run(
        "sample", fashion_bundle, "--labels", "Bag", "--image", image, "--steps", 2, "--strength", 0.5, "--threads", 1,
        "--latents-out", latents,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    with Image.open(image) as opened, tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        grey = np.asarray(opened.convert("L"))
        same = runtime.sample(labels="Bag", image=grey[..., None], steps=2, strength=0.5)
    np.testing.assert_array_equal(np.load(latents), same.latents)


def test_a_picture_a_mask_and_control_come_from_files(run: Command, bundle: Path, tmp_path: Path) -> None:
    image, mask = pictures(tmp_path)
    out = tmp_path / "out.png"
    outcome = run(
        "sample", bundle, "--prompt", "a fox", "--image", image, "--mask", mask, "--strength", 0.7, "--control", image,
        "--control-scale", 0.5, "-o", out, "--threads", 1, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    settings = json.loads(read_metadata(out)["tstitch-trt"])
    assert (settings["image"], settings["mask"], settings["control"]) == ("photo.png", "mask.png", "photo.png")
    assert (settings["strength"], settings["control_scale"]) == (0.7, 0.5)
    pixels = shown(image)
    with tstitch_trt.load(bundle, threads=1) as runtime:
        same = runtime.sample(
            prompt="a fox", image=pixels, mask=shown(mask), strength=0.7, control=pixels,
            control_scale=0.5,
        )  # fmt: skip
    assert same.images is not None
    np.testing.assert_array_equal(shown(out), same.images[0])


def test_pictures_are_resized_on_request_only(run: Command, bundle: Path, tmp_path: Path) -> None:
    image, _ = pictures(tmp_path, (100, 70))
    asked = ("sample", bundle, "--prompt", "a fox", "--image", image, "--threads", 1)
    refused(run(*asked, "--size", "64x64"), "is 100x70 pixels; needed is 64x64", "--resize")
    refused(run(*asked), "height 70 is no multiple of 16", "64 or 80")
    outcome = run(*asked, "--resize", "--size", "64x64", "-o", tmp_path / "out.png")
    assert outcome.code == 0, outcome.err
    assert shown(tmp_path / "out.png").shape == (64, 64, 3)


def test_embeddings_from_a_file(run: Command, bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hidden = {name: rng.standard_normal((2, 6, 9)).astype(np.float32) for name in ("plain", "steered")}
    stored, out = tmp_path / "prompt.npz", tmp_path / "latents.npy"
    np.savez(stored, **{f"{name}.prompt_embeds": value for name, value in hidden.items()})
    outcome = run("sample", bundle, "--prompt-embeds", stored, "--latents-out", out, "--threads", 1)
    assert outcome.code == 0, outcome.err
    with tstitch_trt.load(bundle, threads=1) as runtime:
        same = runtime.sample(prompt_embeds=hidden, decode=False)
    np.testing.assert_array_equal(np.load(out), same.latents)
    np.savez(stored, prompt_embed=hidden["plain"])
    refused(run("sample", bundle, "--prompt-embeds", stored), "unknown array 'prompt_embed'", "'prompt_embeds'")
    np.savez(stored, **{"plane.prompt_embeds": hidden["plain"]})
    refused(run("sample", bundle, "--prompt-embeds", stored), "unknown member 'plane'")
    stored.write_text("no archive")
    refused(run("sample", bundle, "--prompt-embeds", stored), "is no .npz file")
    refused(run("sample", bundle, "--prompt-embeds", tmp_path / "none.npz"), "does not exist")


def test_what_is_asked_for_must_fit_the_bundle(run: Command, bundle: Path, tiny_pair: TinyPair) -> None:
    refused(run("sample", bundle, "--threads", 1), "nothing says what to draw", "--prompt TEXT")
    refused(run("sample", bundle, "--labels", "1", "--prompt", "a fox"), "it has no classes")
    refused(run("sample", bundle, "--prompt", "a fox", "--size", "big"), "size 'big' is not WIDTHxHEIGHT")
    refused(run("sample", bundle, "--prompt", "a fox", "--size", "64x72"), "height 72 is no multiple of 16 pixels")
    refused(run("sample", bundle, "--prompt", "a fox", "--size", "512x64"), "width 512 is outside what was built")
    refused(run("sample", bundle, "--prompt", "a fox", "--resize"), "--resize was given without a picture")
    refused(run("sample", bundle, "--prompt", "a fox", "--strength", 0.5), "strength was given without a picture")
    refused(run("sample", tiny_pair.bundle, "--prompt", "a fox", "--threads", 1), "it understands no text")
    refused(run("sample", bundle, "--prompt", "a fox", "--tile", "big"), "--tile 'big'", "auto, off")
    refused(run("sample", bundle, "--prompt", "a fox", "--tile", 20), "tiles of 20 pixels", "in steps of 8")


def test_tiles_by_option(run: Command, bundle: Path, tmp_path: Path) -> None:
    """The VAE of this bundle treats every element alone: tiles give the very picture."""
    for name, tile in (("whole", "off"), ("tiles", 32)):
        asked = ("--prompt", "a fox", "--size", "96x64", "--tile", tile, "--threads", 1, "-o", tmp_path / f"{name}.png")
        outcome = run("sample", bundle, *asked)
        assert outcome.code == 0, outcome.err
    np.testing.assert_array_equal(shown(tmp_path / "tiles.png"), shown(tmp_path / "whole.png"))


def test_inspect_shows_parts_sizes_and_conditioning(run: Command, bundle: Path) -> None:
    outcome = run("inspect", bundle)
    assert outcome.code == 0, outcome.err
    for text in (
        "sizes      32..128 x 32..128 (height x width in pixels), in multiples of 16 x 16",
        "asked for  prompts, read by text_encoder, text_encoder_2, pictures to start from, control pictures",
        "text       9 wide from text_encoder, text_encoder_2",
        "its own    latent 1.25 times the bundle's; takes mask and masked picture",
        "its own    takes a ControlNet's residuals",
        "part vae_decoder: vae-decoder, fp32",
        "part controlnet: controlnet, fp32",
    ):
        assert text in outcome.out
    document = run("inspect", bundle, "--json").json
    assert document["parts"]["controlnet"]["engines"][0]["digest"]
