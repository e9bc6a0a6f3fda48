"""Family ``ldm``: the original layout against diffusers' UNet, diffusers folders, and refusal of everything else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.compare import relative_error
from support.dits import sparse_safetensors
from support.exports import network_plan, onnx_of
from support.ldms import ldm_checkpoint, ldm_folder
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.errors import BadCheckpoint, BadInput, UnknownName
from tstitch_export.checkpoint.noise_buffers import noise_of
from tstitch_export.families import open_family
from tstitch_export.families.base import Scalar
from tstitch_export.families.ldm.layout import (
    TABLE,
    Heads,
    LDMConfig,
    config_from_shapes,
    expected_shapes,
    native_size,
    published_name,
)
from tstitch_export.families.unet.layout import PREFIX as UNET

LDM = open_family("ldm")
TINY: dict[str, Scalar] = {"num_heads": 2, "size": 8}
LDM_NOISE = NoiseScheduleSpec(kind="scaled-linear", beta_start=0.0015, beta_end=0.0195)


def through_diffusers(unet: Any, table: Any, sample: Any, timestep: Any, labels: Any) -> Any:
    with torch.no_grad():
        return unet(sample, timestep, encoder_hidden_states=table[labels][:, None]).sample


# --- the original layout


PUBLISHED = {
    "LDM-4 (cin256-v2)": (192, 3, (192, 384, 576, 960), (1, 2, 3), 512, 1001, Heads(number=1), 64, 400),
    "LDM-8 (cin-ldm-vq-f8)": (256, 4, (256, 512, 1024), (0, 1, 2), 512, 1000, Heads(channels=32), 32, 395),
    "LDM-8-S (cin-ldm-vq-f8-lite)": (64, 4, (64, 128, 256), (0, 1, 2), 256, 1000, Heads(channels=32), 32, 25),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_are_read_from_shapes(tmp_path: Path, name: str) -> None:
    """Sizes from arXiv 2112.10752, table 18 (without the autoencoder), and T-Stitch's README."""
    base, channels, widths, attention, context, labels, heads, side, millions = PUBLISHED[name]
    config = LDMConfig(
        base=base, channels=channels, widths=widths, blocks=2, attention=attention, depth=1, context=context,
        labels=labels, heads=heads,
    )  # fmt: skip
    unet = expected_shapes(config)
    shapes = {**{UNET + key: shape for key, shape in unet.items()}, TABLE: (labels, context)}
    assert config_from_shapes(shapes, name="x", heads=None) == config
    assert (published_name(config), native_size(config)) == (name, side)
    assert abs(sum(math.prod(shape) for shape in unet.values()) / 1e6 - millions) < 1.5
    found = LDM.inspect(sparse_safetensors(tmp_path / "model.safetensors", shapes), {})
    assert found.latent == (channels, side, side)
    assert found.labels == labels
    assert found.noise is None  # without the buffer nothing is said


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"num_heads": 2}),
        ({"widths": (32, 64, 96), "blocks": 2, "attention": (0, 2), "heads": (2, 4, 6)}, {"head_channels": 16}),
        ({"widths": (64, 32), "attention": (0, 1), "depth": 2, "channels": 4, "heads": 1}, {"num_heads": 1}),
    ],
    ids=["two-levels", "head-channels", "depth-two"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_original_layout_equals_diffusers(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Scalar], suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    unet, table = ldm_checkpoint(path, **changes)
    inspection = LDM.inspect(path, {**options, "size": 8})
    sample, timestep, labels = LDM.example(inspection, batch=3, seed=0)
    with torch.no_grad():
        got = LDM.load(inspection)(sample, timestep, labels)
    assert relative_error(got, through_diffusers(unet, table, sample, timestep, labels)) < 1e-4
    assert inspection.noise == LDM_NOISE


def test_the_moving_average_is_taken_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    unet, table = ldm_checkpoint(path, ema=True)
    averaged, raw = (LDM.inspect(path, {**TINY, "ema": ema}) for ema in ("true", "false"))
    assert LDM.inspect(path, TINY) == averaged
    inputs = LDM.example(averaged, batch=2, seed=0)
    want = through_diffusers(unet, table, *inputs)
    with torch.no_grad():
        assert relative_error(LDM.load(averaged)(*inputs), want) < 1e-4
        assert relative_error(LDM.load(raw)(*inputs), want) > 0.01
    state = torch.load(path, weights_only=True)["state_dict"]
    state.pop("model_ema.diffusion_modelout2bias")
    torch.save(state, path)
    with pytest.raises(BadCheckpoint, match="moving average of some of its weights only"):
        LDM.inspect(path, TINY)
    assert not LDM.inspect(path, {**TINY, "ema": False}).config["ema"]
    ldm_checkpoint(path)
    with pytest.raises(BadCheckpoint, match="has no moving average"):
        LDM.inspect(path, {**TINY, "ema": True})


@pytest.mark.parametrize("kind", ["uniform", "mean", "zeros"])
def test_a_null_class_can_be_added(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    unet, table = ldm_checkpoint(path, labels=10)
    inspection = LDM.inspect(path, {**TINY, "null_embedding": kind})
    assert inspection.labels == 11
    sample, timestep, _ = LDM.example(inspection, batch=2, seed=0)
    model = LDM.load(inspection)
    row = model.get_submodule("table").weight[10]  # type: ignore[index]
    if kind == "uniform":
        assert 0 <= row.min() < row.max() < 1
        again: Any = LDM.load(inspection).get_submodule("table")
        assert torch.equal(again.weight[10], row)
    else:
        assert torch.allclose(row, {"mean": table.mean(0), "zeros": torch.zeros(24)}[kind])
    longer = torch.cat([table, row[None]])
    labels = torch.tensor([10, 3])
    with torch.no_grad():
        got = model(sample, timestep, labels)
    assert relative_error(got, through_diffusers(unet, longer, sample, timestep, labels)) < 1e-4
    with pytest.raises(UnknownName, match="did you mean 'zeros'"):
        LDM.inspect(path, {**TINY, "null_embedding": "zero"})


def test_noise_and_scaling_come_from_the_buffers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ldm_checkpoint(path)
    state = load_file(path)
    linear = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float()
    save_file({**state, "betas": linear, "scale_factor": torch.tensor(0.18215)}, path)
    found = LDM.inspect(path, TINY)
    assert found.noise == NoiseScheduleSpec(kind="linear", beta_start=1e-4, beta_end=0.02)
    assert (found.scaling, found.shift) == (0.18215, 0.0)
    save_file({**state, "betas": state["betas"].half()}, path)
    half = LDM.inspect(path, TINY).noise
    assert half is not None
    assert half.kind == "scaled-linear"
    assert abs(half.beta_end - 0.0195) < 1e-5
    with pytest.raises(BadCheckpoint, match="neither linear, scaled-linear nor"):
        noise_of(np.geomspace(1e-4, 0.02, 1000), "x")


# --- diffusers folders


@pytest.mark.parametrize("kind", ["attended", "added"])
def test_diffusers_folders_equal_diffusers(tmp_path: Path, kind: str) -> None:
    unet, table = ldm_folder(tmp_path, kind=kind)
    inspection = LDM.inspect(tmp_path, {})
    assert (inspection.layout, inspection.latent, inspection.labels) == ("diffusers", (3, 8, 8), 11)
    assert (inspection.noise, inspection.parametrisation) == (LDM_NOISE, "eps")
    assert "diffusers" in inspection.libraries
    assert LDM.inspect(tmp_path / "unet", {}).noise is None
    inputs = LDM.example(inspection, batch=3, seed=0)
    sample, timestep, labels = inputs
    with torch.no_grad():
        if table is None:
            want = unet(sample, timestep, class_labels=labels).sample
        else:
            want = through_diffusers(unet, table, *inputs)
        assert relative_error(LDM.load(inspection)(*inputs), want) < 1e-5
        wider = LDM.load(LDM.inspect(tmp_path, {"null_embedding": "mean"}))
        assert relative_error(wider(*inputs), want) < 1e-5
        assert torch.isfinite(wider(sample, timestep, torch.full((3,), 11))).all()


def test_diffusers_folders_of_other_models(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"looks like a folder without config\.json"):
        LDM.inspect(tmp_path, {})
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(BadCheckpoint, match="looks like a DiTTransformer2DModel"):
        LDM.inspect(tmp_path, {})
    (tmp_path / "config.json").unlink()
    ldm_folder(tmp_path)
    config = tmp_path / "unet" / "config.json"
    data = json.loads(config.read_text())
    with pytest.raises(BadInput, match=r"config\.json says num_heads"):
        LDM.inspect(tmp_path, {"num_heads": 2})
    for change, words in (
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"out_channels": 6}, "3 channels in and 6 out"),
        ({"block_out_channels": [64, 64]}, r"wanted is conv_in\.weight \[64, 3, 3, 3\]"),
        ({"sample_size": None}, "sample_size None"),
        ({"cross_attention_dim": 32}, r"embedding.weight \[11, 24\]; allowed is one table \[labels, 32\]"),
    ):
        config.write_text(json.dumps(data | change))
        with pytest.raises(BadCheckpoint, match=words):
            LDM.inspect(tmp_path, {})
    config.write_text(json.dumps(data | {"layers_per_block": 2}))
    with pytest.raises(BadCheckpoint, match="do not fit their configuration"):
        LDM.load(LDM.inspect(tmp_path, {}))
    config.write_text(json.dumps(data))
    (tmp_path / "class_embedder").rename(tmp_path / "elsewhere")
    with pytest.raises(BadCheckpoint, match="no class_embedder folder beside it: its context is text"):
        LDM.inspect(tmp_path, {})


def test_an_unconditional_diffusers_unet_is_refused(tmp_path: Path) -> None:
    unet, _ = ldm_folder(tmp_path, kind="added")
    del unet.class_embedding
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(BadCheckpoint, match="without num_class_embeds: it draws without a class"):
        LDM.inspect(tmp_path, {})


# --- the graph


@pytest.mark.parametrize(
    ("form", "precision"),
    [
        ("dynamic", "fp32"),
        ("dynamic", "fp16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("original", "fp16"),
                ("original", "fp32"),
                ("original", "bf16"),
                ("attended", "fp16"),
                ("added", "bf16"),
            )
        ),
    ],
)
def test_onnx_equals_the_module(tmp_path: Path, precision: Any, form: str) -> None:
    """The exporter compares on ONNX Runtime; a dynamic graph at sizes that it was not traced with.

    The fixed size is in the trajectories of pairs (``runtime/test_class_pairs.py``).
    """
    path, options = tmp_path / "ldm.safetensors", {**TINY, "dynamic": form == "dynamic"}
    if form in ("attended", "added"):
        path, options = tmp_path / "m", {"dynamic": True}
        ldm_folder(path, kind=form)
    else:
        ldm_checkpoint(path)
    plan = network_plan("ldm", path, options, precision)
    sample = LDM.inputs(plan.inspection, precision)[0]
    assert sample.shape == (("B", 3, 8, 8) if form == "original" else ("B", 3, "H", "W"))
    check = onnx_of(plan, tmp_path / "out").check
    assert check is not None
    assert check.rel_l2 < {"fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-2}[precision]


# --- what is refused


def test_other_checkpoints_are_called_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    lookalikes = {
        "a DiT": ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"],
        "a UNet": ["conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
        "a U-ViT": ["mid_block.attn.qkv.weight", "in_blocks.0.attn.qkv.weight"],
        "something unknown": ["layer1.weight"],
    }
    for kind, names in lookalikes.items():
        save_file({name: torch.zeros(2, 2) for name in names}, path)
        with pytest.raises(
            BadCheckpoint, match=f"is no class-conditional latent diffusion model: it looks like {kind}"
        ):
            LDM.inspect(path, TINY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(f"{UNET}input_blocks.3.1.norm.bias"), r"lacks 1 tensors, e.g. input_blocks.3.1.norm.bias"),
        (lambda s: s.update({f"{UNET}out.2.bias": torch.zeros(7)}), r"of shape \[7\]; allowed is \[3\]"),
        (
            lambda s: s.update({f"{UNET}label_emb.weight": torch.zeros(1)}),
            "no latent diffusion UNet has, e.g. label_emb",
        ),
        (lambda s: s.pop(TABLE), "has no class table .* conditioned on nothing that is in the file"),
        (
            lambda s: (s.pop(TABLE), s.update({"cond_stage_model.transformer.text_model.x": torch.zeros(1)})),
            "conditioned on text or something else",
        ),
        (lambda s: s.update({TABLE: torch.zeros(11, 16)}), "class table has 16 columns, its cross-attention takes 24"),
        (
            lambda s: s.pop(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"),
            "has no cross-attention",
        ),
    ],
)
def test_incomplete_models_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "model.safetensors"
    ldm_checkpoint(path)
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(BadCheckpoint, match=words):
        LDM.inspect(path, TINY)


def test_what_shapes_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ldm_checkpoint(path)
    with pytest.raises(
        BadCheckpoint, match=r"32, 64 channels may have any number of attention heads.*cin256-v2"
    ) as caught:
        LDM.inspect(path, {"size": 8})
    assert "head_channels" in caught.value.hint
    with pytest.raises(BadCheckpoint, match="latent of any size") as caught:
        LDM.inspect(path, {"num_heads": 2})
    assert "size=N" in caught.value.hint
    for options, words in (
        ({"size": 9}, "size is 9; allowed are multiples of 2"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 2, "head_channels": 16}, "allowed is one of the two"),
        ({"num_heads": "two"}, "'two'"),
    ):
        with pytest.raises(BadInput, match=words):
            LDM.inspect(path, {**TINY, **options})
    with pytest.raises(BadCheckpoint, match="5 attention heads do not divide a level's 32 channels"):
        LDM.inspect(path, {**TINY, "num_heads": 5})
    with pytest.raises(UnknownName, match="did you mean 'num_heads'"):
        LDM.inspect(path, {"numheads": 2})


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ldm_checkpoint(path)
    state = load_file(path)
    state[f"{UNET}out.2.weight"][0, 0, 0, 0] = math.inf
    save_file(state, path)
    with pytest.raises(BadCheckpoint, match=r"out\.2\.weight holds NaN or infinity"):
        LDM.load(LDM.inspect(path, TINY))
    torch.save({"state_dict": load_file(path), "callbacks": os.getcwd}, tmp_path / "model.ckpt")
    with pytest.raises(BadCheckpoint, match="could run code"):
        LDM.inspect(tmp_path / "model.ckpt", TINY)
