"""``tstitch_trt.accelerate``: called like the pipeline it was made from, and equal to it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from diffusers_pipelines import relative, sdxl_pipeline
from tiny_families import controlnet_folder, unet_folder
from tiny_pipelines import PIXELS, noise, picture, scheduler
from tstitch_engines.errors import BadInput, BadSchedule, PairMismatch, UnknownName
from tstitch_trt.cost import Conditions, calibrate
from tstitch_trt.study.store import save_study

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Folder = Path
SD: dict[str, Any] = {
    "prompt": ["a photo of a cat", "the horse on mars"],
    "negative_prompt": ["blurry", "ugly"],
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


def pipeline(sd: Path, solver: str = "pndm", cls: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    import diffusers

    pipe = getattr(diffusers, cls).from_pretrained(
        sd / "large", scheduler=scheduler(solver), safety_checker=None, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fast(pipe: Any, sd: Path, cache: Path, **more: Any) -> Any:
    asked = {
        "small": sd / "small",
        "cache": cache,
        "batch": "1:2:4",
        "height": PIXELS,
        "width": PIXELS,
        "threads": 1,
        **more,
    }
    return tstitch_trt.accelerate(pipe, **asked)


def seeded(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def shared(sd: Path, cache: Path) -> Iterator[Any]:
    with fast(pipeline(sd), sd, cache) as made:
        yield made


@pytest.fixture
def accelerated(shared: Any) -> Any:
    shared.scheduler = scheduler("pndm")
    return shared


# --- equal to the pipeline


@pytest.mark.parametrize("solver", ["pndm", "ddim", "euler", "dpmpp-2m", "unipc", "turbo"])
def test_equal_seeds_draw_equal_pictures(accelerated: Any, solver: str) -> None:
    """With the scheduler that the pipeline has at the time of the call."""
    accelerated.scheduler = scheduler(solver)
    for output in ("latent", "np"):
        want = accelerated.pipe(**SD, generator=seeded(1), output_type=output)
        got = accelerated(**SD, generator=seeded(1), output_type=output, fraction=0.0)
        assert type(got) is type(want)
        assert got.nsfw_content_detected is None
        images = [np.asarray(found.images if output == "np" else found.images.numpy()) for found in (got, want)]
        assert relative(images[0], images[1]) < 1e-3


def test_the_small_one_alone_is_the_pipeline_with_its_unet(accelerated: Any, sd: Path) -> None:
    from diffusers import UNet2DConditionModel

    other = pipeline(sd, unet=UNet2DConditionModel.from_pretrained(sd / "small"))
    want = other(**SD, generator=seeded(2), output_type="latent").images
    got = accelerated(**SD, generator=seeded(2), output_type="latent", fraction=1.0).images
    assert relative(got.numpy(), want.numpy()) < 1e-3
    both = accelerated(**SD, generator=seeded(2), output_type="latent").images
    assert relative(both.numpy(), want.numpy()) > 1e-2
    named = accelerated(**SD, generator=seeded(2), output_type="latent", schedule="small:3,large").images
    np.testing.assert_array_equal(both.numpy(), named.numpy())  # 0.4 of PNDM's 7 evaluations


@pytest.mark.parametrize(
    "asked",
    [
        {"num_images_per_prompt": 2, "generator": 3},
        {"guidance_scale": 1.0, "negative_prompt": None},
        {"guidance_rescale": 0.6},
        {"latents": 5},
        {"generator": [4, 9]},
    ],
    ids=lambda asked: ", ".join(asked),
)
def test_arguments_mean_what_they_mean_to_the_pipeline(accelerated: Any, asked: dict[str, Any]) -> None:
    import torch

    given = {**SD, "generator": 3, "output_type": "latent", **asked}

    def again() -> dict[str, Any]:
        seeds = given["generator"]
        more = {"generator": [seeded(s) for s in seeds] if isinstance(seeds, list) else seeded(seeds)}
        if "latents" in given:
            more["latents"] = torch.from_numpy(noise(2, seed=given["latents"]))
        return {**given, **more}

    want, got = accelerated.pipe(**again()).images, accelerated(**again(), fraction=0.0).images
    assert relative(got.numpy(), want.numpy()) < 1e-3


def test_embeddings_and_pil_and_tuples(accelerated: Any) -> None:
    pipe = accelerated.pipe
    c, u = pipe.encode_prompt(SD["prompt"], "cpu", 1, True, SD["negative_prompt"])
    embeds = {"prompt_embeds": c, "negative_prompt_embeds": u, "num_inference_steps": 4, "return_dict": False}
    want, got = pipe(**embeds, generator=seeded(0)), accelerated(**embeds, generator=seeded(0), fraction=0.0)
    assert got[1] is want[1] is None
    for mine, other in zip(got[0], want[0], strict=True):
        assert mine.size == other.size == (PIXELS, PIXELS)
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(other)).max() <= 1


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
        assert relative(got.numpy(), want.numpy()) < 1e-3
        assert [call[:2] for call in ours] == [call[:2] for call in theirs]
        assert all(relative(a[2], b[2]) < 1e-3 for a, b in zip(ours, theirs, strict=True))


# --- other pipelines


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(accelerated: Any, sd: Path, cache: Path, strength: float) -> None:
    from PIL import Image

    pipe = pipeline(sd, "ddim", "StableDiffusionImg2ImgPipeline")
    asked = {**SD, "image": [Image.fromarray(picture(n)) for n in (1, 2)], "strength": strength}
    want = pipe(**asked, generator=seeded(1), output_type="latent").images
    with fast(pipe, sd, cache) as made:
        got = made(**asked, generator=seeded(1), output_type="latent", fraction=0.0).images
        assert relative(got.numpy(), want.numpy()) < 1e-3
    assert len(list(cache.glob("*.bundle"))) == 1  # one bundle serves both pipelines


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(sd: Path, cache: Path, channels: int, strength: float) -> None:
    from diffusers import UNet2DConditionModel
    from PIL import Image

    more = {}
    if channels == 9:
        folder = cache.parent / "inpainting"
        if not folder.exists():
            unet_folder(folder, "sd", part=None, seed=8, in_channels=9)
        more["unet"] = UNet2DConditionModel.from_pretrained(folder)
    pipe = pipeline(sd, "ddim", "StableDiffusionInpaintPipeline", **more)
    mask = np.zeros((PIXELS, PIXELS), np.uint8)
    mask[16:40, 8:56] = 255
    asked = {**SD, "prompt": SD["prompt"][:1], "negative_prompt": ["ugly"], "height": PIXELS, "width": PIXELS}
    asked |= {"image": Image.fromarray(picture(1)), "mask_image": Image.fromarray(mask), "strength": strength}
    want = pipe(**asked, generator=seeded(1), output_type="latent").images
    with fast(pipe, sd, cache) as made:
        got = made(**asked, generator=seeded(1), output_type="latent", fraction=0.0).images
    assert relative(got.numpy(), want.numpy()) < 1e-3


def test_control(sd: Path, cache: Path, tmp_path: Path) -> None:
    from PIL import Image

    pipe = pipeline(sd, "ddim", "StableDiffusionControlNetPipeline", controlnet=controlnet_folder(tmp_path / "c"))
    asked = {**SD, "image": Image.fromarray(picture(3)), "controlnet_conditioning_scale": 0.7}
    want = pipe(**asked, generator=seeded(1), output_type="latent").images
    with fast(pipe, sd, cache, small=pipe.unet) as made:  # one export for both members
        got = made(**asked, generator=seeded(1), output_type="latent", fraction=0.4).images
        assert relative(got.numpy(), want.numpy()) < 1e-3
        free = made(**{**asked, "controlnet_conditioning_scale": 0.0}, generator=seeded(1), output_type="latent").images
        assert relative(free.numpy(), want.numpy()) > 1e-2


def test_a_distilled_member_is_told_its_guidance(sd: Path, cache: Path, tmp_path: Path) -> None:
    """LCM: four steps, the scale as ``timestep_cond``, one half. The noise between steps is ours, so one step is shown
    to be equal, and more to be drawn by the generator's seed."""
    unet = unet_folder(tmp_path / "lcm", "sd", part=None, seed=9, time_cond_proj_dim=16)
    pipe = pipeline(sd, "lcm", unet=unet)
    asked = {**SD, "negative_prompt": None, "guidance_scale": 6.0, "output_type": "latent"}
    with fast(pipe, sd, cache, small=unet) as made:
        one = {**asked, "num_inference_steps": 1}
        want = pipe(**one, generator=seeded(1)).images
        assert relative(made(**one, generator=seeded(1)).images.numpy(), want.numpy()) < 1e-3
        four = {**asked, "num_inference_steps": 4}
        first, second, other = (made(**four, generator=seeded(s)).images.numpy() for s in (1, 1, 2))
        np.testing.assert_array_equal(first, second)
        assert relative(first, other) > 1e-2


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sdxl_pipeline(tmp_path_factory.mktemp("xl") / "large")


def test_sdxl(xl: Any, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    small = unet_folder(tmp_path_factory.mktemp("ssd1b"), "ssd1b", seed=len("ssd1b"))
    asked = {**SD, "prompt_2": ["mars", "cinematic"], "crops_coords_top_left": (3, 4), "original_size": (100, 80)}
    asked |= {"height": PIXELS, "width": PIXELS}
    with tstitch_trt.accelerate(
        xl, small=small, cache=cache, batch="1:2:4", height=PIXELS, width=PIXELS, threads=1
    ) as made:
        for more in ({}, {"denoising_end": 0.6}, {"negative_prompt": None}):
            call = {**asked, "output_type": "latent", **more}
            want = xl(**call, generator=seeded(1)).images
            got = made(**call, generator=seeded(1), fraction=0.0).images
            assert relative(got.numpy(), want.numpy()) < 1e-3
        want = xl(**asked, generator=seeded(1), output_type="np").images
        got = made(**asked, generator=seeded(1), output_type="np", fraction=0.0)
        assert relative(got.images, want) < 1e-3
        kept, xl.unet = xl.unet, small
        try:
            want = xl(**asked, generator=seeded(1), output_type="latent").images
        finally:
            xl.unet = kept
        got = made(**asked, generator=seeded(1), output_type="latent", fraction=1.0).images
        assert relative(got.numpy(), want.numpy()) < 1e-3


# --- what is built, and when


def test_the_bundle_is_used_again_until_the_weights_change(
    accelerated: Any, sd: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("tstitch_export.build")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it is built again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "build", never)
        fast(pipeline(sd, "euler"), sd, cache).close()  # another solver needs no other bundle
        changed = pipeline(sd)
        changed.unet.conv_out.weight.data.mul_(1.5)
        for pipe, more in ((changed, {}), (pipeline(sd), {"batch": "1:2:2"})):
            with pytest.raises(AssertionError, match="built again"):
                fast(pipe, sd, cache, **more)
        with pytest.raises(AssertionError, match="built again"):
            fast(pipeline(sd), sd, cache, fresh=True)


def test_a_budget_chooses_the_schedule(accelerated: Any) -> None:
    runtime = accelerated.runtime
    found = calibrate(runtime, batches=[1, 2], repeats=1, checks=1)
    save_study(runtime.bundle, found, key=Conditions.of(found).key)
    for budget_ms, schedule in ((1e9, "large"), (None, "small")):
        if budget_ms is None:  # as little as there is
            with pytest.raises(BadInput, match="the cheapest, small:") as caught:
                accelerated(**SD, generator=seeded(3), latency_budget_ms=1e-3)
            budget_ms = float(re.findall(r"latency_budget_ms=([0-9.e+]+)\)", caught.value.hint)[0])
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
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_be_honoured_is_refused(accelerated: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        accelerated(**{**SD, **asked})


def test_a_scheduler_for_other_noise_is_refused(accelerated: Any) -> None:
    for changes, what in (({"prediction_type": "v_prediction"}, "is for v models"), ({"beta_end": 0.02}, "beta_end")):
        accelerated.scheduler = scheduler("ddim", **changes)
        with pytest.raises(BadInput, match=what):
            accelerated(**SD)


def test_pipelines_that_are_not_what_their_weights_say_are_refused(sd: Path, cache: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    pipe = pipeline(sd)
    with pytest.raises(UnknownName, match="unknown diffusers pipeline 'DDIMScheduler'"):
        fast(pipe.scheduler.from_config(scheduler("ddim").config) and scheduler("ddim"), sd, cache)
    with pytest.raises(BadInput, match="does not exist"):
        fast(pipe, sd, cache, small=tmp_path / "none")
    with pytest.raises(BadInput, match="small is a AutoencoderKL"):
        fast(pipe, sd, cache, small=pipe.vae)
    with pytest.raises(BadSchedule, match="both"):
        fast(pipe, sd, cache, fraction=0.5, schedule="small:0.5,large")
    pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
    with pytest.raises(BadInput, match="runs with FreeU"):
        fast(pipe, sd, cache)
    pipe.disable_freeu()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.unet)
    with pytest.raises(BadInput, match="has LoRA layers beside its weights"):
        fast(pipe, sd, cache)


def test_a_small_pipeline_with_its_own_text_encoder_is_refused(sd: Path, cache: Path, tmp_path: Path) -> None:
    other = pipeline(sd)
    next(other.text_encoder.parameters()).data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(PairMismatch, match="has another text_encoder"):
        fast(pipeline(sd), sd, cache, small=tmp_path / "other")
