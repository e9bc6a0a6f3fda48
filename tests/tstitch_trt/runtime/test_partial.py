"""One image of a request becomes NaN: the others are drawn, and the bad one is named."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.command import Command, refused
from support.hand_made_parts import World
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import BadInput, NotFinite
from tstitch_trt import FailedImage, Runtime

SEEDS = tuple(range(10, 17))
BAD = (1, 5)
ASKED: dict[str, Any] = {"steps": 4, "schedule": "plain:2,steered", "seeds": SEEDS}
"""Seven images, which is two chunks of at most four, or four of two where they are guided."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return World().bundle(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with tstitch_trt.load(bundle, threads=1) as loaded:
        yield loaded


def embeds(*bad: int, member: str = "plain") -> dict[str, Any]:
    """For a member those of the images ``bad`` overflow float32 inside it."""
    good = np.random.default_rng(3).standard_normal((len(SEEDS), 6, 9)).astype(np.float32)
    broken = good.copy()
    broken[list(bad)] = 3e38
    return {name: broken if name == member else good for name in ("plain", "steered", "painter")}


def others_equal(got: Any, want: Any, *bad: int) -> None:
    keep = [image for image in range(len(SEEDS)) if image not in bad]
    assert got.drawn == tuple(keep)
    np.testing.assert_array_equal(got.images[keep], want.images[keep])
    np.testing.assert_array_equal(got.latents[keep], want.latents[keep])
    assert np.isnan(got.latents[list(bad)]).all()
    assert not got.images[list(bad)].any()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("member", "step"), [("plain", 1), ("steered", 3)])
def test_the_other_images_are_what_they_are_without_it(
    runtime: Runtime, guidance: float, member: str, step: int
) -> None:
    more: dict[str, Any] = {"guidance": guidance, **ASKED}
    if guidance != 1:
        more["negative_prompt_embeds"] = embeds()
    want = runtime.sample(prompt_embeds=embeds(), **more)
    assert want.failed == ()
    assert want.drawn == tuple(range(7))
    bad = embeds(*BAD, member=member)
    got = runtime.sample(prompt_embeds=bad, partial=True, **more)
    assert got.failed == tuple(FailedImage(image, SEEDS[image], step, member) for image in BAD)
    assert (
        str(got.failed[0]) == f"image 1 (seed 11): NaN or infinity in the latents after step {step}, made by {member!r}"
    )
    others_equal(got, want, *BAD)
    assert pickle.loads(pickle.dumps(got)).failed == got.failed
    # The error of who did not ask for it has the chunks before, and that one as far as it tells.
    with pytest.raises(NotFinite, match=rf"after step {step} of 4, made by member '{member}'.*seed 11") as caught:
        runtime.sample(prompt_embeds=bad, **more)
    assert caught.value.failed[0] == got.failed[0]
    assert caught.value.result is None  # it was in the first chunk
    with pytest.raises(NotFinite, match="seed 15") as caught:
        runtime.sample(prompt_embeds=embeds(5, member=member), **more)
    result = caught.value.result
    done = 4
    assert result.drawn == tuple(range(done))
    np.testing.assert_array_equal(result.images[:done], want.images[:done])
    assert [each.member for each in result.failed] == ["" if image != 5 else member for image in (4, 5, 6)]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.failed) == (str(caught.value), caught.value.failed)
    np.testing.assert_array_equal(again.result.latents, result.latents)


def test_events_show_the_others(runtime: Runtime) -> None:
    asked = {**ASKED, "seeds": SEEDS[:3]}
    good, bad = ({name: rows[:3] for name, rows in embeds(*which).items()} for which in ((), (1,)))
    want = [(event.latents(), event.preview()) for event in runtime.iterate(prompt_embeds=good, **asked)]
    got = [(e.latents(), e.preview()) for e in runtime.iterate(prompt_embeds=bad, partial=True, **asked)]
    for (latents, pictures), (all_latents, all_pictures) in zip(got, want, strict=True):
        np.testing.assert_array_equal(latents[[0, 2]], all_latents[[0, 2]])
        np.testing.assert_array_equal(pictures[[0, 2]], all_pictures[[0, 2]])
        assert not np.isfinite(latents[1]).all()
        assert not pictures[1].any()


def test_on_the_device(runtime: Runtime) -> None:
    want = runtime.sample(prompt_embeds=embeds(), output="device", **ASKED).device_latents
    got = runtime.sample(prompt_embeds=embeds(*BAD), output="device", partial=True, **ASKED)
    np.testing.assert_array_equal(got.device_latents[list(got.drawn)], want[list(got.drawn)])
    assert [failed.image for failed in got.failed] == list(BAD)
    with pytest.raises(NotFinite) as caught:
        runtime.sample(prompt_embeds=embeds(5), output="device", **ASKED)
    np.testing.assert_array_equal(caught.value.result.device_latents[:4], want[:4])
    assert pickle.loads(pickle.dumps(caught.value)).result is None


def test_when_all_fail_it_is_an_error(runtime: Runtime) -> None:
    with pytest.raises(NotFinite, match=r"7 of 7 lanes") as caught:
        runtime.sample(prompt_embeds=embeds(*range(7)), partial=True, **ASKED)
    assert len(caught.value.failed) == 7
    assert caught.value.result is None
    with pytest.raises(BadInput, match="partial is 'yes'"):
        runtime.sample(prompt_embeds=embeds(), partial="yes", **ASKED)  # type: ignore[arg-type]


def test_a_picture_that_the_decoder_makes_nan(runtime: Runtime, tmp_path: Path) -> None:
    """The latents are kept, and the other pictures of its batch are what they are."""
    from onnx import numpy_helper

    world = World()
    model = world.parts["vae_decoder"].model
    conv, tanh = model.graph.node[:2]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}["w"][:, :, 0, 0]
    latents = runtime.sample(prompt_embeds=embeds(), **ASKED).latents
    least = np.einsum("nchw,dc->ndhw", latents, weights).min(axis=(1, 2, 3))
    bad, second = (int(image) for image in np.argsort(least)[:2])
    conv.input.append("bias")  # the root of what is below zero in this image alone
    bias = np.full(3, -(least[bad] + least[second]) / 2, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(bias, "bias"))
    tanh.op_type = "Sqrt"
    with tstitch_trt.load(world.bundle(tmp_path), threads=1) as broken:
        got = broken.sample(prompt_embeds=embeds(), partial=True, **ASKED)
        assert got.failed == (FailedImage(bad, SEEDS[bad], 0, "vae_decoder"),)
        assert str(got.failed[0]).endswith("NaN or infinity in the picture, made by 'vae_decoder'")
        np.testing.assert_array_equal(got.latents, latents)
        assert not got.images[bad].any()
        keep = list(got.drawn)
        np.testing.assert_array_equal(got.images[keep], broken.decode(latents[keep]))
        with pytest.raises(NotFinite, match=rf"in the picture, made by 'vae_decoder' \(seed {SEEDS[bad]}; 1 of"):
            broken.sample(prompt_embeds=embeds(), **ASKED)


def test_the_command_line_writes_the_others(
    bundle: Bundle, runtime: Runtime, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = {f"{name}.prompt_embeds": rows for name, rows in embeds(*BAD).items()}
    np.savez(tmp_path / "embeds.npz", **given)
    run = Command(capfd)
    words = ["sample", bundle.root, "--prompt-embeds", tmp_path / "embeds.npz", "--seeds", "10-16", "--threads", 1]
    words += ["--steps", 4, "--schedule", "plain:2,steered"]
    assert run(*words, "-o", tmp_path / "all").code == 1
    assert not (tmp_path / "all").exists()
    done = run(*words, "--partial", "-o", tmp_path / "all", "--latents-out", tmp_path / "latents.npy", "--json")
    assert done.code == 1
    assert "2 of 7 images were not drawn: image 1 (seed 11): NaN or infinity" in done.err
    assert [failed["image"] for failed in done.json["failed"]] == list(BAD)
    assert [each["seed"] for each in done.json["images"]] == [10, 12, 13, 14, 16]
    assert len(list((tmp_path / "all").iterdir())) == len(done.json["files"]) == 5
    want = runtime.sample(prompt_embeds=embeds(), **ASKED).latents[[0, 2, 3, 4, 6]]
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), want)
    refused(run("sample", bundle.root, "--partial"), "nothing says what to draw")
