"""``tstitch_trt.accelerate``: called like the pipeline it was made from, and equal to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.accelerating import SD, fast, pipeline, seeded
from support.compare import relative_error
from support.tiny_pipelines import PIXELS, noise, scheduler, stitched
from tstitch_engines.errors import BadInput, Busy
from tstitch_trt.study.budget import Conditions
from tstitch_trt.study.calibrate.calibrate import calibrate
from tstitch_trt.study.store import save_study

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def shared(sd: Path, cache: Path) -> Iterator[Any]:
    with fast(pipeline(sd), sd, cache) as made:
        yield made


@pytest.fixture
def accelerated(shared: Any) -> Any:
    shared.scheduler = scheduler("pndm")
    return shared


# --- equal to the pipeline


@pytest.mark.parametrize(
    "solver",
    ["pndm", "ddim", "euler", "dpmpp-2m", "unipc", "turbo", "dpmpp-2m karras", "dpmpp-2m linspace karras",
     "dpmpp-2m exponential", "euler linspace karras", "unipc karras", "tcd"],
)  # fmt: skip
def test_equal_seeds_draw_equal_pictures(accelerated: Any, solver: str) -> None:
    """With the scheduler that the pipeline has at the time of the call."""
    accelerated.scheduler = scheduler(solver)
    for output in ("latent", "np"):
        want = accelerated.pipe(**SD, generator=seeded(1), output_type=output)
        got = accelerated(**SD, generator=seeded(1), output_type=output, fraction=0.0)
        assert type(got) is type(want)
        assert got.nsfw_content_detected is None
        images = [np.asarray(found.images if output == "np" else found.images.numpy()) for found in (got, want)]
        assert relative_error(images[0], images[1]) < 1e-3


def test_the_small_one_alone_is_the_pipeline_with_its_unet(accelerated: Any, sd: Path) -> None:
    from diffusers import UNet2DConditionModel

    other = pipeline(sd, unet=UNet2DConditionModel.from_pretrained(sd / "small"))
    want = other(**SD, generator=seeded(2), output_type="latent").images
    got = accelerated(**SD, generator=seeded(2), output_type="latent", fraction=1.0).images
    assert relative_error(got.numpy(), want.numpy()) < 1e-3
    both = accelerated(**SD, generator=seeded(2), output_type="latent").images
    assert relative_error(both.numpy(), want.numpy()) > 1e-2
    named = accelerated(**SD, generator=seeded(2), output_type="latent", schedule="small:3,large").images
    np.testing.assert_array_equal(both.numpy(), named.numpy())  # 0.4 of PNDM's 7 evaluations


def test_the_rounding_of_a_call_or_of_all(accelerated: Any, sd: Path, cache: Path) -> None:
    def drawn(made: Any, **asked: Any) -> Any:
        made.scheduler = scheduler("ddim")
        return made(**SD, generator=seeded(2), output_type="latent", **asked).images.numpy()

    three, four = (drawn(accelerated, schedule=f"small:{count},large") for count in (3, 4))
    assert relative_error(three, four) > 1e-3
    np.testing.assert_array_equal(drawn(accelerated, fraction=0.5), three)
    np.testing.assert_array_equal(drawn(accelerated, fraction=0.5, rounding="lcm"), four)
    with fast(pipeline(sd), sd, cache, fraction=0.5, rounding="lcm") as made:
        np.testing.assert_array_equal(drawn(made), four)
        np.testing.assert_array_equal(drawn(made, fraction=0.6), four)
        np.testing.assert_array_equal(drawn(made, schedule="small:50%,large"), four)
        np.testing.assert_array_equal(drawn(made, rounding="floor"), three)
        np.testing.assert_array_equal(drawn(made, schedule="small:3,large"), three)  # nothing in it to round
        with pytest.raises(BadInput, match="rounding 'lcm' is given, and the schedule 'small:3,large' has no"):
            drawn(made, schedule="small:3,large", rounding="lcm")
    with pytest.raises(BadInput, match="has no fractions"):
        fast(pipeline(sd), sd, cache, schedule="small:3,large", rounding="floor")
    with pytest.raises(BadInput, match="rounding 'up'"):
        fast(pipeline(sd), sd, cache, rounding="up")


@pytest.mark.parametrize("solver", ["pndm", "dpmpp-2m"])
def test_stitched_is_a_loop_over_both_modules(accelerated: Any, sd: Path, solver: str) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    accelerated.scheduler = scheduler(solver)
    pipe, x = accelerated.pipe, noise(2)
    small = UNet2DConditionModel.from_pretrained(sd / "small")
    c, u = pipe.encode_prompt(SD["prompt"], "cpu", 1, True, SD["negative_prompt"])
    rows = 6 + (solver == "pndm")
    order = [small if i < round(0.4 * rows) else pipe.unet for i in range(rows)]
    halves = {"encoder_hidden_states": u}, {"encoder_hidden_states": c}
    want = stitched(scheduler(solver), order, x, 6, 5.0, lambda unet: halves)
    got = accelerated(**SD, latents=torch.from_numpy(x), output_type="latent").images  # 0.4 where nothing is said
    assert relative_error(got.numpy(), want) < 1e-3


@pytest.mark.parametrize(
    "asked",
    [
        {"num_images_per_prompt": 2, "generator": 3},
        {"guidance_scale": 1.0, "negative_prompt": None},
        {"guidance_rescale": 0.6},
        {"latents": 5},
        {"generator": [4, 9]},
        {"timesteps": [901, 701, 401, 101], "num_inference_steps": None, "solver": "euler"},
        {"timesteps": [999], "num_inference_steps": None, "solver": "lcm"},
        {"num_inference_steps": 1, "solver": "dpmpp-2m karras"},
        {"num_inference_steps": 1, "solver": "euler linspace karras"},
    ],
    ids=lambda asked: ", ".join(asked),
)
def test_arguments_mean_what_they_mean_to_the_pipeline(accelerated: Any, asked: dict[str, Any]) -> None:
    import torch

    given = {**SD, "generator": 3, "output_type": "latent", **asked}
    accelerated.scheduler = scheduler(given.pop("solver", "pndm"))

    def again() -> dict[str, Any]:
        seeds = given["generator"]
        more = {"generator": [seeded(s) for s in seeds] if isinstance(seeds, list) else seeded(seeds)}
        if "latents" in given:
            more["latents"] = torch.from_numpy(noise(2, seed=given["latents"]))
        return {**given, **more}

    want, got = accelerated.pipe(**again()).images, accelerated(**again(), fraction=0.0).images
    assert relative_error(got.numpy(), want.numpy()) < 1e-3


def test_embeddings_and_pil_and_tuples(accelerated: Any) -> None:
    pipe = accelerated.pipe
    c, u = pipe.encode_prompt(SD["prompt"], "cpu", 1, True, SD["negative_prompt"])
    c, u = c.repeat(1, 2, 1), u.repeat(1, 2, 1)  # of two windows, as tools for long prompts make them
    embeds = {"prompt_embeds": c, "negative_prompt_embeds": u, "num_inference_steps": 4, "return_dict": False}
    want, got = pipe(**embeds, generator=seeded(0)), accelerated(**embeds, generator=seeded(0), fraction=0.0)
    assert got[1] is want[1] is None
    for mine, other in zip(got[0], want[0], strict=True):
        assert mine.size == other.size == (PIXELS, PIXELS)
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(other)).max() <= 1


def test_pictures_pass_through_what_the_pipeline_has(accelerated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its safety checker, and the processor that it has at the time of the call."""
    from diffusers.image_processor import VaeImageProcessor

    def blackened(images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        assert clip_input.shape == (2, 3)
        return images * 0 + images[1:], [True, False]

    class Extractor:
        def __call__(self, images: list[Any], return_tensors: str) -> Any:
            import torch

            self.pixel_values = torch.zeros(len(images), 3)
            return self

        def to(self, device: Any) -> Any:
            return self

    pipe = accelerated.pipe
    monkeypatch.setattr(pipe, "safety_checker", blackened)
    monkeypatch.setattr(pipe, "feature_extractor", Extractor())
    plain = VaeImageProcessor(vae_scale_factor=8, do_normalize=False)
    for processor in (pipe.image_processor, plain):
        monkeypatch.setattr(pipe, "image_processor", processor)
        want = pipe(**SD, generator=seeded(1), output_type="np")
        got = accelerated(**SD, generator=seeded(1), output_type="np", fraction=0.0)
        assert got.nsfw_content_detected == want.nsfw_content_detected == [True, False]
        assert relative_error(got.images, want.images) < 1e-3


def test_callbacks_see_each_step_and_may_end_it(accelerated: Any) -> None:
    def record(seen: list[Any], last: int | None = None) -> Any:
        def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen.append((step, int(t), given["latents"].numpy().copy()))
            if step == last:
                pipe._interrupt = True
            return given

        return callback

    for last in (None, 2):
        theirs: list[Any] = []
        ours: list[Any] = []
        asked = {**SD, "output_type": "latent"}
        want = accelerated.pipe(**asked, generator=seeded(0), callback_on_step_end=record(theirs, last)).images
        got = accelerated(**asked, generator=seeded(0), callback_on_step_end=record(ours, last), fraction=0.0).images
        assert relative_error(got.numpy(), want.numpy()) < 1e-3
        assert [call[:2] for call in ours] == [call[:2] for call in theirs]
        assert all(relative_error(a[2], b[2]) < 1e-3 for a, b in zip(ours, theirs, strict=True))


def test_threads_get_their_own_pictures(accelerated: Any) -> None:
    """Of one object, with callbacks, of which one ends its call early."""
    accelerated.scheduler = scheduler("ddim")

    def draw(seed: int) -> np.ndarray:
        def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == seed and seed < 3
            return given

        asked = {**SD, "prompt": f"number {seed}", "negative_prompt": "blurry", "num_inference_steps": 4}
        found = accelerated(**asked, generator=seeded(seed), callback_on_step_end=callback, output_type="latent")
        return np.asarray(found.images.numpy())

    alone = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as threads:
        for want, got in zip(alone * 2, threads.map(draw, [*range(4)] * 2), strict=True):
            np.testing.assert_array_equal(got, want)
    with pytest.raises(Busy, match="own request"):
        accelerated(**SD, callback_on_step_end=lambda *_: accelerated(**SD), output_type="latent")


def test_callbacks_may_look_at_the_pipeline_and_change_nothing(accelerated: Any) -> None:
    seen: list[Any] = []

    def look(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.num_timesteps, pipe.vae.config.scaling_factor, pipe.scheduler))
        return {}

    accelerated.scheduler = scheduler("ddim")
    accelerated(**SD, callback_on_step_end=look, output_type="latent")
    assert seen == [(6, 0.18215, accelerated.pipe.scheduler)] * 6

    def cut(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {}

    with pytest.raises(AttributeError, match="_guidance_scale"):
        accelerated(**SD, callback_on_step_end=cut)
    with pytest.raises(AttributeError, match="has no 'load_lora_weights'; the pipeline it was made from is its pipe"):
        _ = accelerated.load_lora_weights


def test_a_budget_chooses_the_schedule(accelerated: Any) -> None:
    runtime = accelerated.runtime
    found = calibrate(runtime, batches=[1, 2], repeats=1, checks=1)
    save_study(runtime.bundle, found, key=Conditions.of(found).key)
    with pytest.raises(BadInput, match="the cheapest") as caught:
        accelerated(**SD, generator=seeded(3), latency_budget_ms=1e-3)
    # Which one that is was measured: these two are so small that it may be either.
    (cheapest,) = re.findall(r"the cheapest, (\S+) \(pndm\)", caught.value.message)
    (least,) = re.findall(r"latency_budget_ms=([0-9.e+]+)", caught.value.hint)
    for budget_ms, schedule in ((1e9, "large"), (float(least), cheapest)):
        asked = {**SD, "output_type": "latent", "return_dict": False}
        got = accelerated(**asked, generator=seeded(3), latency_budget_ms=budget_ms)[0]
        want = accelerated(**asked, generator=seeded(3), schedule=schedule)[0]
        np.testing.assert_array_equal(got.numpy(), want.numpy())


# --- refusals


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sigmas": [1.0, 0.5]}, "sigmas was given, which compiled engines can't honour"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs was given"),
        ({"ip_adapter_image": object()}, "ip_adapter_image was given"),
        ({"strenght": 0.5}, "unknown argument of StableDiffusionPipeline 'strenght'"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"height": 72, "width": 64}, "height 72 is outside what was built"),
        ({"generator": [None]}, "1 generators for 2 pictures"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "allowed is"),
        (
            {"callback_on_step_end": lambda p, i, t, k: {"latents": 2 * k["latents"]}},
            "changed the latents after step 0",
        ),
        ({"fraction": 0.5, "schedule": "small:2,large"}, "both fraction"),
        ({"fraction": 0.5, "latency_budget_ms": 100.0}, "fraction 0.5 is given beside a budget"),
        ({"rounding": "lcm", "latency_budget_ms": 100.0}, "rounding 'lcm' is given beside a budget"),
        ({"prompt": 5}, "prompt is 5; allowed is a text or a list of texts"),
        ({"num_images_per_prompt": 10**8}, "num_images_per_prompt is 100000000"),
        ({"num_inference_steps": float("nan")}, "num_inference_steps is nan"),
        ({"guidance_scale": 1e39}, "guidance_scale is 1e\\+39; allowed is a number that float32 holds"),
        ({"clip_skip": 99}, "StableDiffusionPipeline can't encode this prompt"),
        ({"generator": 3}, "generator is 3; allowed is a torch.Generator"),
        ({"latents": [1.0]}, "allowed is a tensor of floats"),
        (
            {"height": 60, "width": 64},
            "StableDiffusionPipeline does not take this: `height` and `width` have to be div",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_be_honoured_is_refused(accelerated: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        accelerated(**{**SD, **asked})


@pytest.mark.parametrize(
    ("solver", "asked", "message"),
    [
        ("euler", {"eta": 0.5}, "eta is 0.5, and EulerDiscreteScheduler does not use it"),
        ("ddim", {"timesteps": [900, 100]}, "timesteps was given, and DDIMScheduler takes none"),
        ("dpmpp-2m karras", {"timesteps": [900, 100]}, "Cannot use `timesteps` with `config.use_karras_sigmas = True`"),
        ("turbo", {"num_inference_steps": 61}, "num_inference_steps is 61; with timestep_spacing 'trailing'"),
        ("lcm", {"num_inference_steps": 51}, "LCMScheduler can't place its steps by num_inference_steps 51"),
    ],
)
def test_what_the_scheduler_does_not_take_is_refused(
    accelerated: Any, solver: str, asked: dict[str, Any], message: str
) -> None:
    accelerated.scheduler = scheduler(solver)
    with pytest.raises(BadInput, match=re.escape(message)):
        accelerated(**{**SD, **asked})


def test_a_scheduler_for_other_noise_is_refused(accelerated: Any) -> None:
    for changes, what in (
        ({"prediction_type": "v_prediction"}, "is for v models"),
        ({"beta_end": 0.02}, r"beta 0\.00085 to 0\.02;"),
    ):
        accelerated.scheduler = scheduler("ddim", **changes)
        with pytest.raises(BadInput, match=what):
            accelerated(**SD)
