"""What ``tstitch_trt.accelerate`` makes of the files and modules it is given: when it builds, and what it refuses."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from support.accelerating import LIMIT, SD, fast, pipeline, seeded
from support.compare import relative_error
from support.hub_server import running_hub
from support.tiny_checkpoints import single_file
from support.tiny_families import STABLE_DIFFUSION_2, original_unet, unet_folder
from support.tiny_pipelines import scheduler
from tstitch_engines.errors import BadCheckpoint, BadInput, BadSchedule, PairMismatch, UnknownName
from tstitch_export.families.unet.conventions import SPREAD_OF
from tstitch_trt.pipeline.checkpoint import conventions_said, path_hash, save_small

# diffusers hands numpy its tensors in a way that newer versions of numpy warn of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class BuiltError(Exception):
    pass


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a build is an error."""

    def build(*_: object, **__: object) -> None:
        raise BuiltError

    monkeypatch.setattr(importlib.import_module("tstitch_export.build"), "build", build)


@pytest.fixture
def built(sd: Path, cache: Path) -> None:
    fast(pipeline(sd), sd, cache).close()


# --- what is built, and when


def test_the_bundle_is_used_again_until_the_weights_change(built: None, never: None, sd: Path, cache: Path) -> None:
    fast(pipeline(sd, "euler"), sd, cache).close()  # another solver needs no other bundle
    fast(pipeline(sd), sd, cache, schedule="large").close()
    changed = pipeline(sd)
    changed.unet.conv_out.weight.data.mul_(1.5)
    for pipe, more in ((changed, {}), (pipeline(sd), {"batch": "1:2:2"}), (pipeline(sd), {"fresh": True})):
        with pytest.raises(BuiltError):
            fast(pipe, sd, cache, **more)


def test_a_damaged_bundle_is_built_again(built: None, sd: Path, cache: Path, tmp_path: Path) -> None:
    with fast(pipeline(sd), sd, cache) as made:
        root = made.runtime.bundle.root
    own = shutil.copytree(root, tmp_path / root.name)
    engine = next(path for path in own.rglob("*") if path.is_file() and path.stat().st_size > 10_000)
    engine.write_bytes(b"")
    with fast(pipeline(sd), sd, tmp_path) as made:
        assert made.runtime.bundle.root == own
        made(**SD, output_type="latent")


def test_bundles_are_listed_and_pruned_with_the_cache(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from support.command import Command
    from tstitch_engines.bundle.cache import default_root

    shutil.copytree(default_root(), tmp_path / "cache", symlinks=True)  # so that nothing has to be exported
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    tstitch = Command(capfd)

    def kept() -> list[Any]:
        listed = tstitch("cache", "list", "--json").json["entries"]
        return [entry for entry in listed if entry["what"].startswith("accelerated pipeline")]

    with fast(pipeline(sd), sd, None) as made:
        root = made.runtime.bundle.root
    assert root.parent == tmp_path / "cache/pipelines"
    (entry,) = kept()
    assert entry["bytes"] == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert "accelerated pipeline: sd15-bksdm-tiny bundle" in tstitch("cache").out
    assert not tstitch("cache", "prune", "--older-than", "1d", "--json").json["removed"]
    removed = tstitch("cache", "prune", "--max-size", "1kB", "--json").json["removed"]
    assert entry["key"] in {gone["key"] for gone in removed}
    assert not kept()
    assert not root.exists()


# --- the small one


@pytest.mark.slow
def test_small_is_a_single_file(sd: Path, cache: Path, tmp_path: Path) -> None:
    """It is marked as predicting v with betas that are rescaled, the pipeline is as usual."""
    file = single_file(tmp_path / "sd.safetensors", text=False, vae=False)
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel.from_pretrained(tmp_path / "parts/unet")
    text = {"cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2, "norm_num_groups": 32}
    assert {key: module.config[key] for key in text} == text
    pipe = pipeline(sd, "ddim", unet=module)
    embeds = [torch.randn(1, 77, 768, generator=seeded(n)) for n in (1, 2)]
    asked = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "num_inference_steps": 4}
    save_file({**load_file(file), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    with fast(pipe, sd, cache, small=file) as made:
        members = made.runtime.manifest.members
        found = {name: (member.parametrisation, member.noise) for name, member in members.items()}
        assert found == {"small": ("v", replace(made.runtime.manifest.noise, zero_terminal_snr=True)),
                         "large": ("eps", None)}  # fmt: skip

    zero = scheduler("ddim", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe.scheduler = zero
    want = pipe(**asked, generator=seeded(1), output_type="latent").images
    with fast(pipe, sd, cache, small=file) as made:
        got = made(**asked, generator=seeded(1), output_type="latent", fraction=1.0).images
    assert relative_error(got.numpy(), want.numpy()) < LIMIT


def test_a_single_file_says_what_it_says(sd: Path, tmp_path: Path) -> None:
    """And where it says nothing, it is not taken for what such files usually are not."""
    file = single_file(tmp_path / "sd.safetensors", text=False, vae=False)
    v_zero = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    noise = {"betas": torch.linspace(1e-4, 0.02, 1000)}

    def written(pipe: Any, tensors: dict[str, Any], **options: Any) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        save_file({**load_file(file), **tensors}, folder / "small.safetensors")
        (folder / "large/scheduler").mkdir(parents=True)
        pipe.scheduler.save_pretrained(folder / "large/scheduler")
        said = conventions_said({f"small.{name}": value for name, value in options.items()})
        made = save_small(folder / "small.safetensors", pipe, folder / "large", folder / "small", said)
        config: dict[str, Any] = json.loads((made / "scheduler/scheduler_config.json").read_text())
        return {key: config.get(key) for key in ("prediction_type", "rescale_betas_zero_snr", "beta_schedule")}

    def as_list(*values: Any) -> dict[str, Any]:
        return dict(zip(("prediction_type", "rescale_betas_zero_snr", "beta_schedule"), values, strict=True))

    usual, v = pipeline(sd, "ddim"), pipeline(sd, "ddim")
    v.scheduler = scheduler("ddim", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert written(usual, {}) == as_list("epsilon", False, "scaled_linear")
    assert written(usual, v_zero) == as_list("v_prediction", True, "scaled_linear")
    assert written(pipeline(sd, "pndm"), v_zero) == as_list("v_prediction", True, "scaled_linear")
    assert written(usual, noise) == as_list("epsilon", False, "linear")
    assert written(usual, v_zero, prediction="eps", zero_snr=False) == as_list("epsilon", False, "scaled_linear")
    assert written(v, v_zero) == as_list("v_prediction", True, "scaled_linear")
    with pytest.raises(BadCheckpoint, match="does not say what it predicts; the pipeline predicts v") as caught:
        written(v, {})
    assert 'options={"small.prediction": "v"}' in caught.value.hint
    with pytest.raises(BadCheckpoint, match="does not say whether its betas are rescaled"):
        written(v, {}, prediction="v")
    assert written(v, {}, prediction="v", zero_snr="true") == as_list("v_prediction", True, "scaled_linear")
    assert written(v, {}, prediction="eps", zero_snr=False) == as_list("epsilon", False, "scaled_linear")


def test_the_hash_of_a_single_file_has_what_is_said_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"x")
    found = {path_hash(file)}
    for name in ("x.yaml", "config.json"):
        (tmp_path / name).write_text("{}")
        found.add(path_hash(file))
    assert len(found) == 3
    (tmp_path / "y.yaml").write_text("another model's")
    assert path_hash(file) in found
    assert path_hash(file.rename(tmp_path / "z.safetensors")) not in found  # without x.yaml


def test_a_bare_unet_of_stable_diffusion_2_follows_its_own_weights(sd: Path, tmp_path: Path) -> None:
    """A 512-base model before a 768-v pipeline: its folder, that of its training and the loaded module say by their
    weights what they are.
    """
    module = unet_folder(tmp_path / "base", "sd", part=None, **STABLE_DIFFUSION_2)
    pipe = pipeline(sd, "ddim")
    pipe.scheduler = scheduler("ddim", prediction_type="v_prediction")
    pipe.scheduler.save_pretrained(tmp_path / "large/scheduler")
    for spread, prediction in ((0.02, "epsilon"), (0.3, "v_prediction"), (0.0, "v_prediction")):
        bias = module.get_parameter(SPREAD_OF)
        bias.data = torch.linspace(-1, 1, bias.numel()) * 3**0.5 * spread
        module.save_pretrained(tmp_path / "base")
        module.save_pretrained(tmp_path / "training/unet")
        for small in (module, tmp_path / "base", tmp_path / "training"):
            folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "small"
            made = save_small(small, pipe, tmp_path / "large", folder, conventions_said({}))
            config = json.loads((made / "scheduler/scheduler_config.json").read_text())
            assert config["prediction_type"] == prediction


def test_a_compiled_unet_is_the_module_within(built: None, never: None, sd: Path, cache: Path) -> None:
    pipe = pipeline(sd)
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block)
    pipe.vae.decoder = torch.compile(pipe.vae.decoder)
    pipe.unet, pipe.vae = torch.compile(pipe.unet), torch.compile(pipe.vae)
    fast(pipe, sd, cache).close()


# --- its text encoder


def other_text(sd: Path, folder: Path, change: Any) -> Path:
    """A pipeline with another text encoder, in a folder."""
    shutil.copytree(sd / "large", folder)
    file = folder / "text_encoder/model.safetensors"
    save_file({key: change(tensor) for key, tensor in load_file(file).items()}, file)
    return folder


def test_a_small_pipeline_with_its_own_text_encoder_is_refused(
    built: None, never: None, sd: Path, cache: Path, tmp_path: Path
) -> None:
    """Also where its bundle would be there, and where it is one file. What a shorter type rounds is equal."""
    other = other_text(sd, tmp_path / "other", lambda tensor: 2 * tensor)
    with pytest.raises(PairMismatch, match="the small pipeline other has another text_encoder"):
        fast(pipeline(sd), sd, cache, small=other)
    with pytest.raises(BuiltError):
        fast(pipeline(sd), sd, cache, small=other_text(sd, tmp_path / "half", lambda tensor: tensor.half()))
    for name in ("float8_e4m3fn", "float8_e5m2"):
        dtype = getattr(torch, name)
        with pytest.raises(BuiltError):
            fast(pipeline(sd), sd, cache, small=other_text(sd, tmp_path / name, lambda t, dtype=dtype: t.to(dtype)))
    with pytest.raises(BuiltError):
        fast(pipeline(sd), sd, cache, small=other_text(sd, tmp_path / "same", lambda tensor: tensor))

    pipe = pipeline(sd)
    names = {f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": tensor.clone()
             for key, tensor in pipe.text_encoder.state_dict().items()}  # fmt: skip
    unet = {key: tensor.clone() for key, tensor in original_unet(pipe.unet).items()}
    save_file({**unet, **names}, tmp_path / "whole.safetensors")
    with pytest.raises(BuiltError):
        fast(pipe, sd, cache, small=tmp_path / "whole.safetensors")
    key = next(key for key in names if key.endswith("layers.1.mlp.fc1.weight"))
    save_file({**unet, **names, key: names[key] + 0.1}, tmp_path / "whole.safetensors")
    with pytest.raises(PairMismatch, match=r"the small pipeline whole.safetensors has another text_encoder"):
        fast(pipe, sd, cache, small=tmp_path / "whole.safetensors")


def test_a_pipeline_with_textual_inversions_has_the_text_encoder_it_had(
    built: None, never: None, sd: Path, cache: Path, tmp_path: Path
) -> None:
    pipe = pipeline(sd)
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<cat>": torch.zeros(3, width)})
    with pytest.raises(BuiltError):
        fast(pipe, sd, cache, small=other_text(sd, tmp_path / "same", lambda tensor: tensor))
    with pytest.raises(PairMismatch, match="has another text_encoder"):
        fast(pipe, sd, cache, small=other_text(sd, tmp_path / "other", lambda tensor: 2 * tensor))


@pytest.mark.parametrize("how", ["compiled", "offloaded"])
def test_a_text_encoder_that_is_compiled_or_kept_elsewhere_is_what_it_was(
    never: None, sd: Path, cache: Path, tmp_path: Path, how: str
) -> None:
    pipe = pipeline(sd)
    if how == "compiled":
        pipe.text_encoder = torch.compile(pipe.text_encoder)
    else:
        pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(BuiltError):
        fast(pipe, sd, cache, small=other_text(sd, tmp_path / "same", lambda tensor: tensor))
    with pytest.raises(PairMismatch, match="has another text_encoder"):
        fast(pipe, sd, cache, small=other_text(sd, tmp_path / "other", lambda tensor: 2 * tensor))


def test_a_small_model_of_hugging_face_is_that_of_a_folder(
    built: None, never: None, sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.publish("org/small", sd / "small")
        fast(pipeline(sd), sd, cache, small="org/small").close()
        hub.publish("org/same", sd / "large")
        with pytest.raises(BuiltError):
            fast(pipeline(sd), sd, cache, small="org/same")
        hub.publish("org/other", other_text(sd, tmp_path / "other", lambda tensor: 2 * tensor))
        with pytest.raises(PairMismatch, match="the small pipeline other has another text_encoder"):
            fast(pipeline(sd), sd, cache, small="org/other")


# --- refusals


def test_what_can_not_be_accelerated_is_refused(never: None, sd: Path, cache: Path, tmp_path: Path) -> None:
    pipe = pipeline(sd)
    with pytest.raises(UnknownName, match="unknown diffusers pipeline 'DDIMScheduler'"):
        fast(scheduler("ddim"), sd, cache)
    with pytest.raises(BadInput, match="does not exist"):
        fast(pipe, sd, cache, small=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match="empty has no UNet2DConditionModel: it looks like a folder without config"):
        fast(pipe, sd, cache, small=tmp_path / "empty")
    with pytest.raises(BadInput, match="small is a AutoencoderKL"):
        fast(pipe, sd, cache, small=pipe.vae)
    with pytest.raises(BadInput, match="small is a StableDiffusionPipeline") as caught:
        fast(pipe, sd, cache, small=pipeline(sd))
    assert "small=pipeline.unet" in caught.value.hint
    with pytest.raises(BadSchedule, match="both"):
        fast(pipe, sd, cache, fraction=0.5, schedule="small:0.5,large")
    with pytest.raises(UnknownName, match="unknown backend 'onnxruntim'"):
        fast(pipe, sd, tmp_path, backend="onnxruntim")


def test_modules_that_are_not_what_their_weights_say_are_refused(never: None, sd: Path, cache: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    pipe = pipeline(sd)
    pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
    with pytest.raises(BadInput, match=r"up_blocks.0.[bs][12] is"):
        fast(pipe, sd, cache)
    pipe.disable_freeu()
    pipe.vae.decoder.conv_in.padding_mode = "circular"
    with pytest.raises(
        BadInput, match=r"pipeline's vae .* decoder.conv_in.padding_mode is 'circular'; expected is 'zeros'"
    ):
        fast(pipe, sd, cache)
    pipe.vae.decoder.conv_in.padding_mode = "zeros"
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), pipe.unet)
    with pytest.raises(BadInput, match="has LoRA layers beside its weights"):
        fast(pipe, sd, cache)
    pipe = pipeline(sd)
    weight = pipe.unet.conv_in.weight
    pipe.unet.conv_in.weight = torch.nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match=r"unet is quantised: conv_in\.weight holds torch\.int8"):
        fast(pipe, sd, cache)


def test_a_pipeline_that_changed_since_is_refused(built: None, never: None, sd: Path, cache: Path) -> None:
    """At the next call, whatever of it changed; put back it runs again."""
    from diffusers import UNet2DConditionModel

    pipe = pipeline(sd)
    asked = {**SD, "output_type": "latent", "num_inference_steps": 1}
    with fast(pipe, sd, cache) as made:
        made(**asked)
        own, pipe.unet = pipe.unet, UNet2DConditionModel.from_pretrained(sd / "small")
        with pytest.raises(BadInput, match="the pipeline's unet is not the one that was accelerated"):
            made(**asked)
        pipe.unet = own
        hook = pipe.vae.decoder.register_forward_hook(lambda module, args, out: -out)
        with pytest.raises(BadInput, match=r"the pipeline's vae .* decoder.forward_hooks has"):
            made(**asked)
        hook.remove()
        pipe.prepare_latents = lambda *_: None
        with pytest.raises(BadInput, match="prepare_latents of the pipeline was replaced"):
            made(**asked)
        del pipe.prepare_latents
        pipe.scheduler.alphas_cumprod[-1] = 1e-8
        with pytest.raises(BadInput, match="alphas_cumprod of the pipeline's scheduler"):
            made(**asked)
        pipe.scheduler = scheduler("pndm")
        made(**asked)


def test_subclasses_are_saved_as_their_bases(built: None, never: None, sd: Path, cache: Path) -> None:
    """Their bundle is that of the base."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    mine = type("Mine", (StableDiffusionPipeline,), {})
    unet = type("MyUNet", (UNet2DConditionModel,), {}).from_pretrained(sd / "large/unet")
    own = type("MyScheduler", (PNDMScheduler,), {}).from_config(scheduler("pndm").config)
    pipe = mine(**{**pipeline(sd).components, "unet": unet, "scheduler": own}, requires_safety_checker=False)
    with fast(pipe, sd, cache) as made:
        made(**SD, output_type="latent")
