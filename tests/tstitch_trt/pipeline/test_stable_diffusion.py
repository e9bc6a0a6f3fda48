"""Stable Diffusion pairs on our runtime against diffusers' own pipelines: same scheduler, prompt, noise, guidance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.compare import relative_error
from support.diffusers_pipelines import settings_of
from support.tiny_families import clip_vocabulary
from support.tiny_pipelines import PIXELS, noise, picture, scheduler, stitched
from tstitch_engines.errors import Unavailable
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_trt import Runtime

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 6
ASKED: dict[str, Any] = {"prompt": ["a photo of a cat", "the horse on mars"], "negative_prompt": "blurry ugly"}
SOLVERS = ["pndm", "ddim", "euler", "dpmpp-2m", "dpmpp-2m karras", "unipc"]


@pytest.fixture(scope="module")
def runtime(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    output = tmp_path_factory.mktemp("bundle") / "sd.bundle"
    sides = Range(PIXELS, PIXELS, PIXELS + 32)
    build(
        "sd15-bksdm-tiny",
        members={"small": sd / "small", "large": sd / "large"},
        output=output,
        profile=Range(1, 2, 4),
        height=sides,
        width=sides,
    )
    return tstitch_trt.load(output, threads=1)


@pytest.fixture(scope="module")
def unets(sd: Path) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    return {
        "small": UNet2DConditionModel.from_pretrained(sd / "small"),
        "large": UNet2DConditionModel.from_pretrained(sd / "large" / "unet"),
    }


def pipeline(sd: Path, solver: str = "pndm", cls: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    import diffusers

    pipe = getattr(diffusers, cls).from_pretrained(
        sd / "large", scheduler=scheduler(solver), safety_checker=None, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(solver: str) -> Mapping[str, Any]:
    return settings_of(scheduler(solver))


def theirs(pipe: Any, *, latents: Any = None, output: str = "latent", **asked: Any) -> np.ndarray:
    import torch

    given = {**ASKED, "num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": output, **asked}
    if given["guidance_scale"] > 1 and isinstance(given.get("negative_prompt"), str):
        given["negative_prompt"] = [given["negative_prompt"]] * len(given["prompt"])
    found = pipe(**given, latents=None if latents is None else torch.from_numpy(latents)).images
    return found if output == "np" else found.numpy()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_member_alone_is_its_own_pipeline(
    runtime: Runtime, sd: Path, unets: dict[str, Any], solver: str, fraction: float
) -> None:
    x = noise(2)
    pipe = pipeline(sd, solver, unet=unets["small" if fraction else "large"])
    result = runtime.sample(
        **ASKED, steps=STEPS, guidance=5.0, latents=x, fraction=fraction, decode=False, **ours(solver)
    )
    assert relative_error(result.latents, theirs(pipe, latents=x)) < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stitched_trajectory_is_a_loop_over_both_modules(
    runtime: Runtime, sd: Path, unets: dict[str, Any], solver: str
) -> None:
    x, schedule = noise(2), scheduler(solver)
    pipe = pipeline(sd, solver)
    c, u = pipe.encode_prompt(ASKED["prompt"], "cpu", 1, True, [ASKED["negative_prompt"]] * 2)
    rows = STEPS + (solver == "pndm")
    order = [unets["small" if i < round(0.4 * rows) else "large"] for i in range(rows)]
    want = stitched(
        schedule, order, x, STEPS, 5.0, lambda unet: ({"encoder_hidden_states": u}, {"encoder_hidden_states": c})
    )
    result = runtime.sample(**ASKED, steps=STEPS, guidance=5.0, latents=x, fraction=0.4, decode=False, **ours(solver))
    assert relative_error(result.latents, want) < 1e-3


def test_pictures_are_those_of_diffusers(runtime: Runtime, sd: Path) -> None:
    """A larger picture, unguided, from the bundle's own defaults: they are the pipeline's."""
    x = noise(2, side=PIXELS // 8 + 4)
    asked = {"prompt": ASKED["prompt"]}
    want = theirs(pipeline(sd), latents=x, output="np", guidance_scale=1.0, negative_prompt=None,
                  height=PIXELS + 32, width=PIXELS + 32)  # fmt: skip
    result = runtime.sample(**asked, steps=STEPS, guidance=1.0, latents=x, fraction=0.0)
    assert result.images is not None
    assert result.images.shape == (2, PIXELS + 32, PIXELS + 32, 3)
    assert np.abs(result.images / 255.0 - want).max() < 1.01 / 255


def test_guidance_is_rescaled_as_in_diffusers(runtime: Runtime, sd: Path) -> None:
    x = noise(2, seed=2)
    want = theirs(pipeline(sd, "ddim"), latents=x, guidance_rescale=0.7)
    got = runtime.sample(**ASKED, steps=STEPS, guidance=5.0, guidance_rescale=0.7, latents=x, fraction=0.0,
                         decode=False, **ours("ddim"))  # fmt: skip
    assert relative_error(got.latents, want) < 1e-3


@pytest.mark.parametrize(("solver", "strength"), [("ddim", 0.7), ("euler", 0.5), ("dpmpp-2m", 0.5), ("unipc", 0.5)])
def test_a_picture_is_drawn_over_as_img2img(runtime: Runtime, sd: Path, solver: str, strength: float) -> None:
    """Both start from one latent: the encoder's own draw is another test.

    PNDM is left out: entered in the middle, diffusers takes the first step twice as at the start, but reads on one
    timestep further for it, and ends a step short of the picture.
    """
    import torch

    pipe = pipeline(sd, solver, "StableDiffusionImg2ImgPipeline")
    clean, z = 0.7 * noise(2, seed=3), noise(2, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(z))
        want = pipe(
            **{**ASKED, "negative_prompt": [ASKED["negative_prompt"]] * 2}, image=torch.from_numpy(clean),
            strength=strength, num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
        ).images.numpy()  # fmt: skip
    got = runtime.sample(**ASKED, image=clean, latents=z, strength=strength, steps=STEPS, guidance=5.0, fraction=0.0,
                         decode=False, **ours(solver))  # fmt: skip
    assert relative_error(got.latents, want) < 1e-3


def test_an_encoded_picture_is_that_of_diffusers(runtime: Runtime, sd: Path) -> None:
    import torch

    pipe = pipeline(sd)
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        theirs = pipe.vae.encode(pixels).latent_dist
    encoder = runtime._vae.encoder
    assert encoder is not None
    mean, std = encoder.encode(pixels.numpy())
    assert relative_error(mean, theirs.mean.numpy() * pipe.vae.config.scaling_factor) < 1e-4
    assert relative_error(std, theirs.std.numpy() * pipe.vae.config.scaling_factor) < 1e-4


@pytest.mark.parametrize(("solver", "strength"), [("ddim", 1.0), ("ddim", 0.6), ("pndm", 1.0), ("euler", 0.6)])
def test_what_lies_outside_the_mask_stays_as_in_inpainting(
    runtime: Runtime, sd: Path, solver: str, strength: float
) -> None:
    """4 channels: the picture's own latents are put back after every step."""
    import torch

    pipe = pipeline(sd, solver, "StableDiffusionInpaintPipeline")
    clean, z = 0.7 * noise(1, seed=3), noise(1, seed=4)
    mask = np.zeros((PIXELS, PIXELS), np.float32)
    mask[16:40, 8:56] = 1
    asked = {"prompt": ASKED["prompt"][:1], "negative_prompt": ["ugly"]}
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(z))
        want = pipe(
            **asked, image=torch.from_numpy(clean), mask_image=torch.from_numpy(mask)[None, None], strength=strength,
            masked_image_latents=torch.zeros(1, 4, 8, 8), height=PIXELS, width=PIXELS,
            num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent",
        ).images.numpy()  # fmt: skip
    got = runtime.sample(**asked, image=clean, mask=mask, latents=z, strength=strength, steps=STEPS, guidance=5.0,
                         fraction=0.0, decode=False, **ours(solver))  # fmt: skip
    assert relative_error(got.latents, want) < 1e-3


def test_long_prompts_are_read_in_chunks(runtime: Runtime, sd: Path) -> None:
    """Three windows of 75 tokens with their own begin and end, the negative prompt filled up with empty ones."""
    import torch

    text = " ".join(["a photo of the cat riding on mars, cinematic portrait"] * 20)
    pipe = pipeline(sd)
    ids = pipe.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    vocabulary, _ = clip_vocabulary()
    begin, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    assert 150 < len(ids) <= 225
    windows = [[begin, *ids[k : k + 75], end] for k in (0, 75, 150)]
    empty = [begin] + [end] * 76
    rows = torch.tensor([window + [end] * (77 - len(window)) for window in windows] + [empty] * 3)
    with torch.inference_mode():
        hidden = pipe.text_encoder(rows)[0]
    c, u = hidden[:3].reshape(1, 231, -1), hidden[3:].reshape(1, 231, -1)
    x = noise(1)
    want = theirs(pipe, latents=x, prompt=None, negative_prompt=None, prompt_embeds=c, negative_prompt_embeds=u)
    got = runtime.sample(prompt=text, latents=x, steps=STEPS, guidance=5.0, fraction=0.0, decode=False)
    assert relative_error(got.latents, want) < 1e-3


def test_bare_unets_take_embeddings_and_give_latents(sd: Path, unets: dict[str, Any], tmp_path: Path) -> None:
    manifest = build(
        "sd15-bksdm-tiny",
        members={"small": sd / "small", "large": sd / "large" / "unet"},
        output=tmp_path / "bare.bundle",
        profile=Range(1, 2, 4),
        height=Range(PIXELS, PIXELS, PIXELS),
        width=Range(PIXELS, PIXELS, PIXELS),
    )
    assert not manifest.parts
    assert any("gives latents, not pictures" in note for note in manifest.notes)
    assert any("takes prompt_embeds [N,T,32]" in note for note in manifest.notes)
    pipe = pipeline(sd)
    c, u = pipe.encode_prompt(ASKED["prompt"], "cpu", 1, True, [ASKED["negative_prompt"]] * 2)
    x = noise(2)
    with tstitch_trt.load(tmp_path / "bare.bundle") as runtime:
        embeds = {"prompt_embeds": c.detach().numpy(), "negative_prompt_embeds": u.detach().numpy()}
        result = runtime.sample(**embeds, steps=STEPS, guidance=5.0, latents=x, fraction=0.0)
        assert result.images is None
        assert relative_error(result.latents, theirs(pipe, latents=x)) < 1e-3
        with pytest.raises(Unavailable, match="has no text encoder, so it can't read prompts"):
            runtime.sample(prompt="a cat")


@pytest.mark.slow
def test_inversions_and_masks_of_a_saved_pipeline(sd: Path, tmp_path: Path) -> None:
    """A textual inversion of three vectors in the pipeline, one in a file beside it, and ``use_attention_mask``."""
    import torch

    pipe = pipeline(sd, "ddim")
    vectors = torch.randn(5, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<cat>": vectors[:3]})
    pipe.text_encoder.config.use_attention_mask = True
    pipe.save_pretrained(tmp_path / "saved")
    torch.save({"mystyle": vectors[3:]}, tmp_path / "style.bin")
    build(
        "sd15-bksdm-tiny",
        members={"small": sd / "small", "large": tmp_path / "saved"},
        output=tmp_path / "sd.bundle",
        options={"text_encoder.textual_inversion": str(tmp_path / "style.bin")},
        profile=Range(1, 2, 4),
        **dict.fromkeys(("height", "width"), Range(PIXELS, PIXELS, PIXELS)),
    )
    pipe.load_textual_inversion(str(tmp_path / "style.bin"))
    x, asked = noise(2), {**ASKED, "prompt": ["a photo of a <cat>", "the <cat> on mars, mystyle"]}
    with tstitch_trt.load(tmp_path / "sd.bundle", threads=1) as runtime:
        given: dict[str, Any] = {"steps": STEPS, "guidance": 5.0, "latents": x, "fraction": 0.0, "decode": False}
        result = runtime.sample(**asked, **given, **ours("ddim"))
    assert relative_error(result.latents, theirs(pipe, latents=x, **asked)) < 1e-3
    pipe.text_encoder.config.use_attention_mask = False
    assert relative_error(result.latents, theirs(pipe, latents=x, **asked)) > 1e-2
