"""Text bundles with all their parts: prompts, pictures to start from, masks and a ControlNet, against float64 loops."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

import tstitch_trt
from support.hand_made import CHANNELS
from support.hand_made_parts import FACTOR, Control, World
from support.reference import walk
from support.tiny import TinyPair
from tstitch_engines.device.host_kernels import normal
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP, ROW
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt import Runtime
from tstitch_trt.request.init_image import ENCODER_NOISE_STEP, make_init_image
from tstitch_trt.request.parse import InitOptions
from tstitch_trt.runtime.stepper import Stepper

STEPS = 6


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def runtime(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return tstitch_trt.load(world.bundle(tmp_path_factory.mktemp("whole")), threads=1)


def noise_of(seeds: list[int], step: int = INITIAL_NOISE_STEP, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    shape = (CHANNELS, *size)
    return np.stack([normal(seed, step, int(np.prod(shape))).reshape(shape) for seed in seeds])


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def expected(
    world: World, plan: Any, start: np.ndarray, conditional: Any, unconditional: Any = None, first: int = 0
) -> np.ndarray:
    """``conditional(sample, name)`` gives a member's inputs, ``unconditional`` those of the other half."""

    def model(x: np.ndarray, t: float, step: int) -> Any:
        name = plan.schedule.names[first + step]
        found = world.members[name](x, t, conditional(x, name))
        if not plan.guided[first + step]:
            return found
        return found, world.members[name](x, t, unconditional(x, name))

    rows = plan.rows[first:]
    return walk(rows, start, model, np.zeros((len(rows), *start.shape)))[-1]


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max())


def test_prompts_go_round_and_become_pictures(runtime: Runtime, world: World) -> None:
    """Five images of two prompts, one of which takes two chunks; one negative prompt; chunks of two lanes."""
    prompts, long = ["a red fox", "a blue bear blurry sky sea"], 2
    result = runtime.sample(
        prompt=prompts, negative_prompt="blurry", n=5, seed=3, steps=STEPS, guidance=3.0, schedule="plain"
    )
    plan = runtime.plan(steps=STEPS, guidance=3.0, schedule="plain")
    seeds = [3, 4, 5, 6, 7]
    hidden = np.stack([world.hidden(prompts[i % 2], long) for i in range(5)])
    other = np.stack([world.hidden("blurry", long)] * 5)
    want = expected(
        world, plan, plan.init_scale * noise_of(seeds),
        lambda x, name: {"encoder_hidden_states": hidden}, lambda x, name: {"encoder_hidden_states": other},
    )  # fmt: skip
    assert close(result.latents, want)
    assert result.prompts == ("a red fox", prompts[1], "a red fox", prompts[1], "a red fox")
    pixels = np.clip(np.rint((world.decode(want) + 1) * 127.5), 0, 255).transpose(0, 2, 3, 1)
    assert result.images is not None
    assert result.images.shape == (5, 64, 64, 3)
    assert np.abs(result.images.astype(int) - pixels).max() <= 1


def test_without_a_negative_prompt_the_other_half_is_the_empty_one(runtime: Runtime) -> None:
    asked: dict[str, Any] = {"prompt": "a fox", "steps": STEPS, "guidance": 2.0, "schedule": "plain", "decode": False}
    plain, empty = runtime.sample(**asked), runtime.sample(**asked, negative_prompt="")
    np.testing.assert_array_equal(plain.latents, empty.latents)
    assert not close(runtime.sample(**asked, negative_prompt="blurry").latents, plain.latents)
    with pytest.raises(BadInput, match="negative_prompt has no effect"):
        runtime.sample(**{**asked, "guidance": 1.0}, negative_prompt="blurry")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_controlnet_steers_the_members_that_let_it(
    runtime: Runtime, world: World, guidance: float, caplog: pytest.LogCaptureFixture
) -> None:
    """It sees the very sample of the step in both halves; where it does not run the residuals are zero again."""
    seeds, hint = [7, 8, 9], picture(4)
    asked: dict[str, Any] = {"prompt": "a red fox", "n": 3, "seed": 7, "steps": STEPS, "guidance": guidance}
    asked |= {"schedule": "plain:0.5,steered", "decode": False}
    plan = runtime.plan(**{k: asked[k] for k in ("steps", "guidance", "schedule")})
    start = plan.init_scale * noise_of(seeds)
    seen = np.stack([hint.transpose(2, 0, 1) / 255.0] * 3)
    control: Control = world.control

    def given(text: str, scale: float) -> Any:
        hidden = np.stack([world.hidden(text)] * 3)

        def inputs(x: np.ndarray, name: str) -> dict[str, np.ndarray]:
            return {"encoder_hidden_states": hidden, **control(x, hidden, seen, scale)}

        return inputs

    for scale in (0.0, 1.0, 0.5):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            more = {"control": hint, "control_scale": scale} if scale else {}
            ours = runtime.sample(**asked, **more).latents
        assert ("member plain takes no control" in caplog.text) == bool(scale)
        assert close(ours, expected(world, plan, start, given("a red fox", scale), given("", scale)))


def test_control_asks_for_a_member_that_takes_it(runtime: Runtime) -> None:
    with pytest.raises(BadInput, match=r"none of the members that run takes control: plain"):
        runtime.sample(prompt="a fox", control=picture(), schedule="plain", steps=2)
    with pytest.raises(BadInput, match="control is 80x64 pixels"):
        runtime.sample(prompt="a fox", control=picture(size=(64, 80)), height=64, width=64, steps=2, schedule="steered")


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp-2m"])
@pytest.mark.parametrize("strength", [0.34, 0.7, 1.0])
def test_a_picture_is_drawn_again_from_where_strength_says(
    runtime: Runtime, world: World, solver: str, strength: float
) -> None:
    image, seeds = picture(1, (64, 96)), [5, 6, 7]
    result = runtime.sample(
        prompt="a red fox", image=image, strength=strength, n=3, seed=5, steps=STEPS, solver=solver, schedule="plain",
        guidance=1.0, decode=False,
    )  # fmt: skip
    first = STEPS - min(int(STEPS * strength), STEPS)
    plan = runtime.plan(steps=STEPS, solver=solver, schedule="plain", guidance=1.0, start=first)
    mean, std = world.encode((image.transpose(2, 0, 1)[None] / 127.5) - 1)
    clean = mean + std * noise_of(seeds, ENCODER_NOISE_STEP, (8, 12))
    start = plan.table.a[first] * clean + plan.table.s[first] * noise_of(seeds, size=(8, 12))
    hidden = np.stack([world.hidden("a red fox")] * 3)
    want = expected(world, plan, start, lambda x, name: {"encoder_hidden_states": hidden}, first=first)
    assert close(result.latents, want)
    assert [(t.member, t.steps) for t in result.timings] == [("plain", STEPS - first)]


def test_masks_become_smaller_as_torch_makes_them(runtime: Runtime) -> None:
    """The mask is in pixels and ends anywhere, also between two elements of the latent."""
    mask = (np.random.default_rng(0).uniform(size=(2, 1, 64, 96)) < 0.5).astype(np.float32)
    init = InitOptions(np.zeros((1, CHANNELS, 8, 12), np.float32), mask, mask[:, :, :8, :12], 1.0)
    made = make_init_image(runtime.manifest, None, init, (5, 6), (CHANNELS, 8, 12), None)
    want = torch.nn.functional.interpolate(torch.from_numpy(mask), size=(8, 12), mode="nearest")
    np.testing.assert_array_equal(made.mask, want.numpy())


def test_what_the_encoder_draws_is_not_the_noise_of_the_trajectory(runtime: Runtime) -> None:
    """A latent drawn with the noise that is then added to it would start from too much noise, or too little."""

    def unit(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(pictures), CHANNELS, *(side // FACTOR for side in pictures.shape[2:]))
        return np.zeros(shape, np.float32), np.ones(shape, np.float32)

    size = (256, 256)
    init = InitOptions(picture(size=size)[None], None, None, 1.0)
    made = make_init_image(runtime.manifest, unit, init, (5, 6), (CHANNELS, *(side // FACTOR for side in size)), None)
    found = np.corrcoef([*made.clean.reshape(2, -1), *made.noise.reshape(2, -1)])
    assert np.abs(found - np.eye(4)).max() < 6 / made.clean[0].size ** 0.5


def test_a_mask_keeps_the_rest_of_the_picture(runtime: Runtime, world: World) -> None:
    """As diffusers blends: after every step the outside is the picture at the noise of the next, at last clean."""
    image, seeds = picture(2), [5, 6, 7]
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 8:64] = 255
    result = runtime.sample(
        prompt="a red fox", image=image, mask=mask, n=3, seed=5, steps=STEPS, schedule="plain", guidance=1.0
    )
    plan = runtime.plan(steps=STEPS, schedule="plain", guidance=1.0)
    mean, std = world.encode((image.transpose(2, 0, 1)[None] / 127.5) - 1)
    clean, z = mean + std * noise_of(seeds, ENCODER_NOISE_STEP), noise_of(seeds)
    inside = (mask[::FACTOR, ::FACTOR] >= 128)[None, None].astype(float)
    hidden = np.stack([world.hidden("a red fox")] * 3)
    x = plan.init_scale * z
    for step in range(STEPS):
        m = world.members["plain"](
            plan.rows[step, ROW["C_IN"]] * x, plan.rows[step, ROW["T"]], {"encoder_hidden_states": hidden}
        )
        row = plan.rows[step]
        x = row[ROW["A"]] * x + row[ROW["B"]] * (row[ROW["P"]] * x + row[ROW["Q"]] * m)
        a, s = (plan.table.a[step + 1], plan.table.s[step + 1]) if step + 1 < STEPS else (1.0, 0.0)
        x = inside * x + (1 - inside) * (a * clean + s * z)
    assert close(result.latents, x)
    outside = np.broadcast_to(inside == 0, x.shape)
    np.testing.assert_allclose(result.latents[outside], clean[outside], rtol=1e-5, atol=1e-6)
    plain = runtime.sample(prompt="a red fox", n=3, seed=5, steps=STEPS, schedule="plain", guidance=1.0)
    assert not close(plain.latents, result.latents)  # and the next request is not blended


def test_a_member_that_paints_is_given_mask_and_masked_picture(runtime: Runtime, world: World) -> None:
    """In its own latent scaling, in both halves; its steps are not blended. A member beside it is."""
    image, seeds = picture(3), [5]
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    asked: dict[str, Any] = {"prompt": "a red fox", "seed": 5, "steps": STEPS, "guidance": 2.0}
    result = runtime.sample(**asked, image=image, mask=mask, schedule="painter")
    plan = runtime.plan(steps=STEPS, guidance=2.0, schedule="painter")
    hole = np.where(mask[..., None], 0.0, image / 127.5 - 1).transpose(2, 0, 1)[None]
    mean, std = world.encode(hole)
    seen = mean + std * noise_of(seeds, ENCODER_NOISE_STEP)
    inside = mask[::FACTOR, ::FACTOR][None, None].astype(float)
    inpaint = np.concatenate([inside, 1.25 * seen], axis=1)

    def given(text: str) -> Any:
        return lambda x, name: {"encoder_hidden_states": world.hidden(text)[None], "inpaint": inpaint}

    want = expected(world, plan, plan.init_scale * noise_of(seeds), given("a red fox"), given(""))
    assert close(result.latents, want)
    mixed = runtime.sample(**asked, image=image, mask=mask, schedule="painter:0.5,plain")
    clean, spread = world.encode((image.transpose(2, 0, 1)[None] / 127.5) - 1)
    clean = clean + spread * noise_of(seeds, ENCODER_NOISE_STEP)
    outside = np.broadcast_to(inside == 0, clean.shape)
    np.testing.assert_allclose(mixed.latents[outside], clean[outside], rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="member 'painter' paints into a picture, and there is no picture or no mask"):
        runtime.sample(**asked, schedule="painter")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 0.0}, "strength is 0; allowed is above 0 up to 1"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": 0.1}, "strength 0.1 of 6 steps leaves no step to run"),
        ({"start_step": 2}, "both image and start_step 2"),
        ({"mask": np.zeros((32, 64))}, "the mask is 64x32 pixels, the picture 64x64"),
        ({"mask": np.zeros((64, 64), np.int64)}, "mask is int64[64, 64]"),
        ({"image": np.zeros((1, 3, 8, 8), np.float32)}, "image is float32[1, 3, 8, 8], taken as latents"),
    ],
)
def test_bad_beginnings(runtime: Runtime, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        runtime.sample(**{"prompt": "a fox", "image": picture(), "steps": STEPS, "schedule": "plain", **change})
    assert words in caught.value.message


def test_the_parts_of_a_bundle_are_in_memory_and_let_go(world: World, runtime: Runtime) -> None:
    assert runtime.memory()["parts io"] > 0
    assert runtime.sample(prompt="a fox", steps=2, schedule="plain", n=3, decode=False).images is None
    events = [event.preview().shape for event in runtime.iterate(prompt="a fox", steps=2, schedule="plain")]
    assert events == [(1, 64, 64, 3)] * 2


def test_pictures_of_class_bundles_start_from_their_pixels(tiny_pair: TinyPair) -> None:
    """There the latent is the picture: no encoder is needed."""
    with tstitch_trt.load(tiny_pair.bundle, threads=1) as classes:
        image = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
        kept = classes.sample(labels=[1, 2], image=image, mask=np.zeros((8, 8), bool), steps=4, fraction=0.5)
        assert kept.images is not None
        np.testing.assert_array_equal(kept.images, np.stack([image, image]))
        again = classes.sample(labels=[1, 2], image=image, strength=0.5, steps=4, fraction=0.5)
        plan = classes.plan(steps=4, fraction=0.5)
        z = np.stack([normal(seed, INITIAL_NOISE_STEP, 256).reshape(4, 8, 8) for seed in (0, 1)])
        clean = (image / 127.5 - 1).transpose(2, 0, 1)[None]
        state = (plan.table.a[2] * clean + plan.table.s[2] * z).astype(np.float32)
        same = classes.sample(labels=[1, 2], latents=state, start_step=2, steps=4, fraction=0.5)
        assert close(again.latents, same.latents)
        with pytest.raises(Unavailable, match="no ControlNet"):
            classes.sample(labels=[1], control=picture(size=(8, 8)), steps=2)


def test_tiles_are_as_asked_for_and_checked_before_anything_runs(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This VAE treats every element alone, so that tiles give the very picture."""
    asked: dict[str, Any] = {"prompt": "a fox", "steps": 2, "schedule": "plain", "height": 64, "width": 96}
    with caplog.at_level("INFO"):
        whole = runtime.sample(**asked).images
        assert "tiles" not in caplog.text
        tiled = runtime.sample(**asked, tile=32).images
    assert "vae_decoder: 12 tiles of 32x32 pixels" in caplog.text
    assert whole is not None
    assert tiled is not None
    np.testing.assert_array_equal(tiled, whole)
    last = [event.preview() for event in runtime.iterate(**asked, tile=48)][-1]
    assert np.abs(last.astype(int) - whole.astype(int)).max() <= 1
    (from_tiles, from_whole) = (
        runtime.sample(**{**asked, "height": None, "width": None}, image=picture(), tile=tile).latents
        for tile in (32, "auto")  # type: ignore[arg-type]
    )
    np.testing.assert_allclose(from_tiles, from_whole, rtol=1e-5, atol=1e-5)

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a step ran")

    monkeypatch.setattr(Stepper, "stepping", never)
    for tile, words in ((0, "tile = 0"), (True, "tile = True"), ("on", "tile = 'on'"), (4096, "tiles of 4096 pixels")):
        with pytest.raises(BadInput, match=words):
            runtime.sample(**asked, tile=tile)  # type: ignore[arg-type]


def test_tiles_ask_for_a_vae(tiny_pair: TinyPair) -> None:
    with tstitch_trt.load(tiny_pair.bundle) as runtime, pytest.raises(BadInput, match="has no VAE"):
        runtime.sample(labels=[1], steps=2, tile=64)
