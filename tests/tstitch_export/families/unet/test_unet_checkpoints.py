"""Where UNets and ControlNets are read from, what is read of them, and what is refused saying what it looks like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.dits import diffusers_folder, sparse_safetensors
from support.tiny_checkpoints import planned, said, text_recipe
from support.tiny_families import (
    SDXL,
    clip_text_folder,
    controlnet_folder,
    original_control,
    original_unet,
    unet_folder,
)
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.bundle.scheduler_config import read_training
from tstitch_engines.errors import BadCheckpoint, PairMismatch
from tstitch_export.build import build
from tstitch_export.families import Inspection, open_family
from tstitch_export.families.controlnet.family import residuals_fit
from tstitch_export.families.unet.config import UNetConfig, published_name
from tstitch_export.families.unet.layout import config_from_shapes

SD, XL = open_family("unet-sd"), open_family("unet-sdxl")
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Tiny, but with the text widths by which a single file is recognised, and heads of 64 where projections are linear.
ORIGINALS: dict[str, dict[str, Any]] = {
    "sd": {"cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2},
    "inpainting": {"kind": "sd", "cross_attention_dim": 768, "attention_head_dim": 8, "in_channels": 9},
    "sd2": {
        "kind": "sd",
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
    },
    "sdxl": SDXL,
    "refiner": {**SDXL, "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 1280 + 5 * 256},
    "ssd1b": SDXL,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with everything a UNet's inspection looks at."""
    folder = tmp_path_factory.mktemp("pipeline")
    unet_folder(folder, "sd", sample_size=[12, 8])
    files = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        "vae/config.json": {"_class_name": "AutoencoderKL", "scaling_factor": 0.3, "shift_factor": 0.1},
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def copied(pipeline: Path, folder: Path) -> Path:
    shutil.copytree(pipeline, folder / "copy")
    return folder / "copy"


def state_of(inspection: Inspection) -> dict[str, torch.Tensor]:
    return dict(open_family(inspection.family).load(inspection).unet.state_dict())  # type: ignore[union-attr]


# --- what is read


def test_a_pipeline_says_more_than_its_unet(pipeline: Path) -> None:
    whole, bare = SD.inspect(pipeline, {}), SD.inspect(pipeline / "unet", {})
    assert whole.noise == NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
    assert (whole.parametrisation, whole.scaling, whole.shift) == ("v", 0.3, 0.1)
    assert whole.scheduler is not None
    assert whole.scheduler["steps_offset"] == 1
    assert (bare.noise, bare.parametrisation, bare.scaling, bare.shift, bare.scheduler) == (None,) * 5
    assert whole.path == bare.path == pipeline / "unet"
    assert whole.files == bare.files == (pipeline / "unet/config.json", pipeline / "unet" / WEIGHTS)
    assert whole.latent == bare.latent == (4, 12, 8)
    assert {name: dim.native for name, dim in SD.dims(whole).items()} == {"H": 12, "W": 8, "T": 77}


def test_shards_and_half_precision_variants_are_the_same_weights(pipeline: Path, tmp_path: Path) -> None:
    want = load_file(pipeline / "unet" / WEIGHTS)
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(pipeline / "unet/config.json", folder)
    names = sorted(want)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: want[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    found = SD.inspect(folder, {})
    assert [file.name for file in found.files] == ["config.json", *parts, f"{WEIGHTS}.index.json"]
    got = state_of(found)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    (folder / "b.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"names b\.safetensors, which is not beside it"):
        SD.inspect(folder, {})

    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(pipeline / "unet/config.json", half)
    save_file({key: tensor.half() for key, tensor in want.items()}, half / "diffusion_pytorch_model.fp16.safetensors")
    got = state_of(SD.inspect(half, {}))
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert all(torch.equal(got[key], want[key].half().float()) for key in want)


@pytest.mark.parametrize("name", ORIGINALS)
def test_single_files_in_the_original_layout(name: str, tmp_path: Path) -> None:
    """The configuration from shapes alone, the names as diffusers' own conversion gives them."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    changes = dict(ORIGINALS[name])
    module = unet_folder(tmp_path, changes.pop("kind", name), norm_num_groups=32, **changes)
    stored = original_unet(module)
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(2), "alphas_cumprod": torch.zeros(3)}
    save_file({**stored, **others}, tmp_path / "model.safetensors")
    theirs = convert_ldm_unet_checkpoint(dict(stored), dict(module.config))
    assert theirs.keys() == module.state_dict().keys(), "the file is what diffusers takes for this model"
    assert all(torch.equal(theirs[key], tensor) for key, tensor in module.state_dict().items())

    family = XL if name in ("sdxl", "refiner", "ssd1b") else SD
    given = {"prediction": "v"} if name == "sd2" else {}  # this one is too small to tell
    found, folder = family.inspect(tmp_path / "model.safetensors", given), family.inspect(tmp_path, given)
    assert (found.layout, found.files, found.noise) == ("original", (tmp_path / "model.safetensors",), None)
    assert (found.text, found.inpaints) == (folder.text, folder.inpaints)
    told = {key: value for key, value in found.config.items() if key != "size"}
    assert told == {key: value for key, value in folder.config.items() if key != "size"}
    inputs = family.example(found, batch=2, seed=3, sizes={"H": 8, "W": 6, "T": 5})
    with torch.no_grad():
        want = family.load(folder)(*inputs)
        assert torch.equal(family.load(found)(*inputs), want)

    # Under diffusers' names and without config.json: as the original names say it
    save_file({f"_orig_mod.{key}": tensor for key, tensor in module.state_dict().items()}, tmp_path / "own.safetensors")
    own = family.inspect(tmp_path / "own.safetensors", given)
    assert (own.layout, own.files, own.config, own.text) == (
        "diffusers", (tmp_path / "own.safetensors",), found.config, found.text
    )  # fmt: skip
    assert own.unet.raw == found.unet.raw  # type: ignore[attr-defined]
    assert "attention heads are those of the published models" in own.notes[0]
    with torch.no_grad():
        assert torch.equal(family.load(own)(*inputs), want)


def test_a_file_under_diffusers_names_has_the_config_beside_it(pipeline: Path, tmp_path: Path) -> None:
    found, folder = SD.inspect(pipeline / "unet" / WEIGHTS, {}), SD.inspect(pipeline / "unet", {})
    assert (found.config, found.files, found.latent, found.notes) == (folder.config, folder.files, folder.latent, ())
    assert found.unet.raw == folder.unet.raw  # type: ignore[attr-defined]
    guided = unet_folder(tmp_path, "sd", cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=16)
    save_file(guided.state_dict(), tmp_path / "lcm.safetensors")
    assert SD.inspect(tmp_path / "lcm.safetensors", {}).guidance_embedding == 16


@pytest.mark.parametrize(
    ("down", "up", "more"),
    [
        (("CrossAttnDownBlock2D", "KDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"), {}),
        (
            ("KCrossAttnDownBlock2D", "KDownBlock2D"),
            ("KUpBlock2D", "KCrossAttnUpBlock2D"),
            {"mid_block_type": None, "layers_per_block": 2, "time_embedding_type": "fourier", "norm_num_groups": None}
            | {"act_fn": "gelu", "resnet_time_scale_shift": "scale_shift", "conv_in_kernel": 1, "conv_out_kernel": 1},
        ),
        (("AttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "AttnUpBlock2D"), {"attention_head_dim": 8}),
        (
            ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "attention_head_dim": 8},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_other_kinds_of_blocks(down: Any, up: Any, more: dict[str, Any], tmp_path: Path) -> None:
    module = unet_folder(tmp_path, "sd", down_block_types=down, up_block_types=up, **more)
    found = SD.inspect(tmp_path, {})
    inputs = SD.example(found, batch=2, seed=3, sizes={"H": 8, "W": 8, "T": 5})
    with torch.no_grad():
        assert torch.allclose(SD.load(found)(*inputs), module(*inputs).sample, atol=1e-6)


def test_a_file_of_scaled_eight_bit_floats(tmp_path: Path) -> None:
    """As ComfyUI stores them: diffusers' module of the numbers that they stand for draws the same."""
    module = unet_folder(tmp_path, "sd", cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32)
    folder = SD.inspect(tmp_path, {})
    state = module.state_dict()
    scales = {key: tensor.abs().max() / 448 for key, tensor in state.items() if tensor.ndim == 2 and "attn" in key}
    eight = {key: (state[key] / scale).to(torch.float8_e4m3fn) for key, scale in scales.items()}
    with torch.no_grad():
        for key, scale in scales.items():
            state[key].copy_(eight[key].float() * scale)
    stored = original_unet(module)
    for key, tensor in list(stored.items()):
        for ours, scale in scales.items():
            if tensor.shape == state[ours].shape and torch.equal(tensor, state[ours]):
                stored[key] = eight[ours].clone()
                stored[key.removesuffix("weight") + "scale_weight"] = scale
    stored["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) == 1 + len(scales)
    save_file(stored, tmp_path / "fp8.safetensors")
    found = SD.inspect(tmp_path / "fp8.safetensors", {})
    inputs = SD.example(folder, batch=2, seed=3, sizes={"H": 8, "W": 6, "T": 5})
    with torch.no_grad():
        got, want = SD.load(found)(*inputs), module(*inputs).sample
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_average_of_a_whole_file_is_left_aside(tmp_path: Path) -> None:
    module = unet_folder(tmp_path, "sd", cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32)
    state = original_unet(module)
    state |= {
        "model_ema." + key.removeprefix("model.").replace(".", ""): torch.zeros_like(tensor)
        for key, tensor in state.items()
        if key.startswith("model.diffusion_model.")
    }
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "full.safetensors")
    found = SD.inspect(tmp_path / "full.safetensors", {})
    assert "(model_ema.diffusion_model...) is not taken" in found.notes[0]
    got = state_of(found)
    assert all(torch.equal(got[key], tensor) for key, tensor in module.state_dict().items())
    # A bundle's notes say it, and of which file
    recipe = text_recipe(tmp_path / "pair.toml", halves=())
    plan = planned(recipe, members=dict.fromkeys(("small", "large"), tmp_path / "full.safetensors"))
    said(plan, "full.safetensors: its moving average", "is not taken")


@pytest.mark.parametrize("layout", ["original", "bare original", "within a pipeline", "diffusers"])
@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl", "refiner"])
def test_single_files_of_controlnets(name: str, layout: str, tmp_path: Path) -> None:
    """The same network as its folder; the original names are those that diffusers' own conversion takes."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    changes = dict(ORIGINALS[name])
    module = controlnet_folder(tmp_path / "folder", changes.pop("kind", name), norm_num_groups=32, **changes)
    stored = original_control(module, "" if layout == "bare original" else "control_model.")
    state = module.state_dict()
    if layout == "original":
        theirs = convert_controlnet_checkpoint(dict(stored), dict(module.config))
        told = {key for key in state if not key.startswith("add_embedding.")}  # which it does not know
        assert theirs.keys() == told
        assert all(torch.equal(theirs[key], state[key]) for key in told)
    if layout == "within a pipeline":
        stored |= {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "alphas_cumprod": torch.zeros(3)}
    save_file(state if layout == "diffusers" else stored, tmp_path / "control.safetensors")
    family = open_family("controlnet")
    found, folder = family.inspect(tmp_path / "control.safetensors", {}), family.inspect(tmp_path / "folder", {})
    assert (found.layout, found.files) == ("single-file", (tmp_path / "control.safetensors",))
    assert (found.config, found.text, found.latent) == (folder.config, folder.text, folder.latent)
    inputs = family.example(found, batch=2, seed=3, sizes={"H": 8, "W": 6, "T": 5})
    with torch.no_grad():
        for got, want in zip(family.load(found)(*inputs), family.load(folder)(*inputs), strict=True):
            assert torch.equal(got, want)


def test_published_architectures_by_name() -> None:
    sd = {"cross_attention_dim": 768, "attention_head_dim": 8}
    tiny = {**sd, "block_out_channels": [320, 640, 1280], "down_block_types": ["CrossAttnDownBlock2D"] * 3}
    xl = {
        "cross_attention_dim": 2048,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    }
    assert published_name(UNetConfig(sd)) == "Stable Diffusion 1.x"
    assert published_name(UNetConfig({**sd, "layers_per_block": 1})) == "BK-SDM-Base"
    assert published_name(UNetConfig({**tiny, "layers_per_block": 1, "mid_block_type": None})) == "BK-SDM-Tiny"
    assert published_name(UNetConfig({**xl, "transformer_layers_per_block": [1, 2, 10]})) == "SDXL"
    ssd1b = {**xl, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [2, 2], [4, 4]]}
    assert published_name(UNetConfig(ssd1b)) == "SSD-1B"
    assert published_name(UNetConfig({**ssd1b, "transformer_layers_per_block": [1, 1, 2]})) == "Vega"
    assert published_name(UNetConfig({**xl, "transformer_layers_per_block": [1, 2, 3]})) is None


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"addition_embed_type": "text"}, r"conditioning that neither .* \(addition_embed_type = 'text'\)"),
        ({"class_embed_type": "projection"}, r"class_embed_type = 'projection'"),
        ({"num_class_embeds": 1000}, r"num_class_embeds = 1000"),
        ({"encoder_hid_dim_type": "image_proj"}, r"encoder_hid_dim_type = 'image_proj'"),
        ({"cross_attention_dim": [32, 64]}, r"cross_attention_dim = \[32, 64\]"),
        ({"in_channels": 8}, "takes 8 channels and gives 4"),
        ({"up_block_types": ["SkipUpBlock2D"] * 2}, "has SkipUpBlock2D, which diffusers' UNet2DConditionModel can't"),
        ({"_class_name": "UNet2DModel"}, "it looks like a UNet2DModel"),
    ],
)
def test_other_kinds_of_unets(changes: dict[str, Any], words: str, pipeline: Path, tmp_path: Path) -> None:
    folder = copied(pipeline, tmp_path) / "unet"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BadCheckpoint, match=words):
        SD.inspect(folder, {})


def test_the_other_family_is_named(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="looks like a UNet of the family unet-sd") as caught:
        XL.inspect(pipeline, {})
    assert 'family = "unet-sd"' in caught.value.hint
    unet_folder(tmp_path, "sdxl")
    with pytest.raises(
        BadCheckpoint, match="no model of the family unet-sd: it looks like a UNet of the family unet-sdxl"
    ):
        SD.inspect(tmp_path, {})


def test_other_things_on_disk(pipeline: Path, tmp_path: Path) -> None:
    diffusers_folder(tmp_path / "dit", layers=1)
    clip_text_folder(tmp_path / "text")
    controlnet_folder(tmp_path / "control")
    for path, words in {
        tmp_path / "dit": "looks like a DiTTransformer2DModel",
        tmp_path / "text/text_encoder": "looks like a CLIPTextModel",
        tmp_path / "control": "looks like a ControlNetModel",
        tmp_path / "text": "a folder without config.json",
        tmp_path / "nowhere": "it does not exist",
    }.items():
        with pytest.raises(BadCheckpoint, match=words):
            SD.inspect(path, {})
    with pytest.raises(BadCheckpoint, match="is no UNet: it looks like a ControlNet"):
        SD.inspect(tmp_path / "control" / WEIGHTS, {})
    with pytest.raises(BadCheckpoint, match="looks like a UNet2DConditionModel"):
        open_family("controlnet").inspect(pipeline / "unet", {})
    with pytest.raises(BadCheckpoint, match="is no ControlNet: it looks like a UNet"):
        open_family("controlnet").inspect(pipeline / "unet" / WEIGHTS, {})


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "SD3 or Flux"),
        (["first_stage_model.encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP text encoder"),
        (["lora_unet_down_blocks_0.lora_down.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight", "control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["x.weight"], "something unknown"),
    ],
)
def test_single_files_of_something_else(names: list[str], words: str, tmp_path: Path) -> None:
    path = sparse_safetensors(tmp_path / "x.safetensors", dict.fromkeys(names, (4, 4)))
    with pytest.raises(BadCheckpoint, match=f"no Stable Diffusion checkpoint: it looks like .*{words}"):
        SD.inspect(path, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_controlnet": (1,)}, "is a Control-LoRA"),
        ({"control_model.zero_convs.0.0.weight": None}, "is no ControlNet: it looks like a ControlNet"),
        ({"control_model.input_blocks.2.0.op.weight": None}, "a tensor that no known ControlNet has"),
        ({"control_model.motion.weight": (4, 4)}, "a tensor that no known ControlNet has: motion.weight"),
        ({"control_model.label_emb.0.0.weight": (32, 2048)}, "a ControlNet of an unknown kind: it takes an embedded"),
        ({"control_model.input_hint_block.0.weight": (8, 4, 3, 3)}, "conditioning_channels = 4"),
    ],
)
def test_single_files_with_a_strange_controlnet(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    module = controlnet_folder(tmp_path, "sd", cross_attention_dim=768, attention_head_dim=8)
    shapes = {key: tuple(tensor.shape) for key, tensor in original_control(module).items()}
    for key, shape in changes.items():
        shapes.pop(key, None)
        shapes |= {} if shape is None else {key: shape}
    path = sparse_safetensors(tmp_path / "x.safetensors", shapes)
    with pytest.raises(BadCheckpoint, match=words):
        open_family("controlnet").inspect(path, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edm_mean": (1, 4)}, "looks like Playground v2.5"),
        ({"model.diffusion_model.label_emb.0.0.weight": (32, 2048)}, "an embedded picture or class beside the text"),
        ({"model.diffusion_model.middle_block.1.transformer_blocks.1.x": (4, 4)}, None),
        ({"model.diffusion_model.motion.weight": (4, 4)}, "a tensor that no known UNet has: motion.weight"),
        ({"model.diffusion_model.output_blocks.1.0.in_layers.0.weight": None}, "no output_blocks.1"),
    ],
)
def test_single_files_with_a_strange_unet(changes: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    module = unet_folder(tmp_path, "sd", cross_attention_dim=768, attention_head_dim=8)
    shapes = {key: tuple(tensor.shape) for key, tensor in original_unet(module).items()}
    for key, shape in changes.items():
        shapes.pop(key, None)
        shapes |= {} if shape is None else {key: shape}
    if words is None:  # a middle of another depth than published, which shapes do tell
        assert config_from_shapes(shapes, name="x")["transformer_layers_per_block"] == [1, 2]
        return
    with pytest.raises(BadCheckpoint, match=words):
        config_from_shapes(shapes, name="x")


def test_weights_that_do_not_fit(pipeline: Path, tmp_path: Path) -> None:
    folder = copied(pipeline, tmp_path) / "unet"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(BadCheckpoint, match="the weights do not fit their configuration: Missing key"):
        SD.load(SD.inspect(folder, {}))
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"][0] = torch.nan
    save_file(state, folder / WEIGHTS)
    with pytest.raises(BadCheckpoint, match=r"conv_in\.bias holds NaN"):
        SD.load(SD.inspect(folder, {}))
    (folder / WEIGHTS).unlink()
    with pytest.raises(BadCheckpoint, match=f"has no {WEIGHTS}"):
        SD.inspect(folder, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'"),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name is 'EDMEulerScheduler'"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "allowed is a class whose noise is that of its betas"),
    ],
)
def test_noise_that_no_schedule_expresses(changes: dict[str, Any], words: str, pipeline: Path, tmp_path: Path) -> None:
    folder = copied(pipeline, tmp_path)
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(BadCheckpoint, match=words) as caught:
        SD.inspect(folder, {})
    assert "MEMBER.noise=scaled-linear:0.00085:0.012" in caught.value.hint
    stated = SD.inspect(folder, {"noise": "linear", "prediction": "x0"}).trained
    assert (stated.prediction, stated.noise) == ("x0", NoiseScheduleSpec(kind="linear"))
    SD.inspect(folder / "unet", {})


def test_noise_without_terminal_signal(pipeline: Path, tmp_path: Path) -> None:
    folder = copied(pipeline, tmp_path)
    file = folder / "scheduler/scheduler_config.json"
    stated = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    found, plain = SD.inspect(folder, {}), SD.inspect(pipeline, {})
    assert plain.noise is not None
    assert found.noise == msgspec.structs.replace(plain.noise, zero_terminal_snr=True)


def test_noise_of_given_betas(pipeline: Path, tmp_path: Path) -> None:
    folder = copied(pipeline, tmp_path)
    file = folder / "scheduler/scheduler_config.json"
    betas = [1e-4, 0.01, 0.02]
    stated = {"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 3}
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    found = SD.inspect(folder, {})
    assert found.trained.noise == NoiseScheduleSpec(kind="betas", betas=tuple(betas), steps=3)
    assert found.scheduler is not None
    assert read_training(found.scheduler, where="x")[0] == found.trained.noise


# --- ControlNets and members


def test_a_controlnet_has_no_noise_of_its_own(pipeline: Path, tmp_path: Path) -> None:
    """The scheduler beside it is the UNet's, whose options say what it does not."""
    folder = copied(pipeline, tmp_path)
    controlnet_folder(folder / "controlnet")
    want = open_family("controlnet").inspect(folder, {})
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_schedule": "sigmoid"}))
    assert open_family("controlnet").inspect(folder, {}) == want
    with pytest.raises(BadCheckpoint, match="noise that can't be expressed"):
        SD.inspect(folder, {})


def test_residuals_of_pruned_members(tmp_path: Path) -> None:
    control = {}
    for kind in ("sd", "sdxl", "ssd1b"):
        controlnet_folder(tmp_path / f"control-{kind}", kind, layers_per_block=2)
        control[kind] = open_family("controlnet").inspect(tmp_path / f"control-{kind}", {})
    depths = {"transformer_layers_per_block": (1, (2, 1)), "reverse_transformer_layers_per_block": ((1, 2, 1), 1)}
    unet_folder(tmp_path / "pruned", "ssd1b", layers_per_block=2, **depths)
    pruned = XL.inspect(tmp_path / "pruned", {"controlled": True})
    names = [*(f"down_residual_{index}" for index in range(6)), "mid_residual"]
    assert residuals_fit(pruned, control["sdxl"]) == {name: name for name in names}
    takes = [spec for spec in XL.inputs(pruned, "fp16") if "residual" in spec.name]
    assert takes == list(open_family("controlnet").outputs(control["sdxl"], "fp16"))
    assert "was not exported to take residuals" in str(
        residuals_fit(XL.inspect(tmp_path / "pruned", {}), control["sdxl"])
    )
    assert "takes text of width 64, control-sd 32" in str(residuals_fit(pruned, control["sd"]))
    unet_folder(tmp_path / "bksdm", "bksdm")
    refused = residuals_fit(SD.inspect(tmp_path / "bksdm", {"controlled": True}), control["sd"])
    assert "takes 5 residuals (32 32 32/2 64/2 64/2), control-sd gives 7" in str(refused)


def test_a_pair_that_one_controlnet_can_not_control_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    """Tiny stand-ins for BK-SDM, Stable Diffusion and its ControlNet."""
    unet_folder(tmp_path / "small", "bksdm")
    unet_folder(tmp_path / "large", "sd", layers_per_block=2)
    controlnet_folder(tmp_path / "control", layers_per_block=2)
    recipe = tmp_path / "pair.toml"
    member = 'family = "unet-sd"\nparametrisation = "eps"\n'
    recipe.write_text(
        'name = "pair"\ndescription = ""\n[defaults]\nsteps = 10\n[latent]\nchannels = 4\nheight = 8\nwidth = 8\n'
        '[noise]\nkind = "scaled-linear"\n[conditioning]\nkind = "text"\n[decoder]\nkind = "none"\n'
        '[parts.controlnet]\nfamily = "controlnet"\n'
        f"[members.small]\n{member}[members.large]\n{member}"
    )
    members = {name: tmp_path / name for name in ("small", "large")}
    given: dict[str, Any] = {"members": members, "output": tmp_path / "out.bundle"}
    with pytest.raises(
        PairMismatch, match=r"part 'controlnet' \(control\) can't control member 'small'.*takes 5 residuals"
    ):
        build(recipe, parts={"controlnet": tmp_path / "control"}, **given)
    controlled = {f"{name}.controlled": True for name in members}
    with pytest.raises(PairMismatch, match="takes the residuals of a ControlNet, and there is none") as caught:
        build(recipe, options=controlled, **given)
    assert "--part controlnet=FOLDER" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_pool_conditions": True}, "global_pool_conditions"),
        ({"conditioning_channels": 1}, "conditioning_channels = 1"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
    ],
)
def test_other_kinds_of_controlnets(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    controlnet_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BadCheckpoint, match=f"a ControlNet of an unknown kind: {words}"):
        open_family("controlnet").inspect(tmp_path, {})
