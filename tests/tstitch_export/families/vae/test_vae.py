"""Families ``vae-decoder`` and ``vae-encoder``: equal to diffusers' autoencoders, scaling included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.compare import relative_error
from support.compiled_parts import export_network
from support.exports import graph_of
from support.tiny_checkpoints import original_vae
from support.tiny_families import kl_folder, vae_folder
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.families import open_family
from tstitch_export.onnx_export.exporter import export_onnx

DECODER, ENCODER = open_family("vae-decoder"), open_family("vae-encoder")
SIZES = ((1, 5, 9), (2, 8, 3))  # batch, height and width of the latent; none of them traced


def ignore(phase: str, share: float) -> None:
    return


def export(family: str, path: Path, folder: Path) -> Any:
    graph = graph_of(export_network(family, path, folder), folder)
    return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


def assert_close(got: Any, want: torch.Tensor, limit: float = 1e-4) -> None:
    assert relative_error(got, want.detach()) <= limit


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("kind", "levels"),
    [("kl", 2), ("tiny", 2), ("vq", 1)],
    ids=["kl", "tiny", "vq"],
)
def test_decoder(tmp_path: Path, kind: str, levels: int) -> None:
    """VQ's differs from KL's in what is done before the levels."""
    model = kl_folder(tmp_path / "vae") if kind == "kl" else vae_folder(tmp_path / "vae", kind, levels=levels)
    found = DECODER.inspect(tmp_path, {})
    assert found.config["kind"] == kind
    factor = found.config["factor"]
    assert factor == 2 ** (levels - 1)
    session = export("vae-decoder", tmp_path / "vae", tmp_path / "out")
    scaling = model.config.scaling_factor
    shift = getattr(model.config, "shift_factor", 0.0) or 0.0
    for batch, height, width in SIZES:
        latent = noise(batch, model.config.latent_channels, height, width)
        (image,) = session.run(["image"], {"latent": latent.numpy()})
        assert image.shape == (batch, 3, factor * height, factor * width)
        # as diffusers' pipelines call it
        assert_close(image, model.decode(latent / scaling + shift).sample)


@pytest.mark.parametrize("kind", ["kl", pytest.param("tiny", marks=pytest.mark.slow), "vq"])
def test_encoder(tmp_path: Path, kind: str) -> None:
    levels = 1 if kind == "vq" else 2
    model = kl_folder(tmp_path / "vae") if kind == "kl" else vae_folder(tmp_path / "vae", kind, levels=levels)
    session = export("vae-encoder", tmp_path / "vae", tmp_path / "out")
    scaling = model.config.scaling_factor
    for batch, height, width in SIZES:
        image = noise(batch, 3, levels * height, levels * width).clamp(-1, 1)
        mean, std = session.run(["mean", "std"], {"image": image.numpy()})
        if kind == "kl":
            posterior = model.encode(image).latent_dist
            assert_close(mean, (posterior.mean - 0.1) * scaling)
            assert_close(std, posterior.std * scaling)
        else:
            assert_close(mean, model.encode(image).latents * scaling)
            assert std.shape == mean.shape
            assert not std.any()


def test_stable_diffusions_scaling(tmp_path: Path) -> None:
    model = vae_folder(tmp_path / "vae")
    latent = noise(1, 4, 4, 4)
    image = DECODER.load(DECODER.inspect(tmp_path, {}))(latent)
    assert_close(image.numpy(), model.decode(latent / 0.18215).sample)


def test_vq_takes_the_nearest_entry(tmp_path: Path) -> None:
    """All entries are in use: an index that is off by one would show."""
    model = vae_folder(tmp_path / "vae", "vq")
    latent = noise(1, 3, 16, 16)
    _, _, (_, _, indices) = model.quantize(latent / 0.5)
    assert len(indices.unique()) > 10
    assert_close(DECODER.load(DECODER.inspect(tmp_path, {}))(latent).numpy(), model.decode(latent / 0.5).sample)


@pytest.mark.parametrize("family", [DECODER, pytest.param(ENCODER, marks=pytest.mark.slow)], ids=["decoder", "encoder"])
def test_half_precision(tmp_path: Path, family: Any) -> None:
    """Inputs are float16, outputs float32: pictures are made from them on the host."""
    vae_folder(tmp_path / "vae", levels=1)
    found = family.inspect(tmp_path, {})
    (tmp_path / "out").mkdir()
    check = export_onnx(family, found, precision="fp16", folder=tmp_path / "out", progress=ignore)
    assert 1e-6 < check.rel_l2 < 1e-2
    assert {spec.dtype for spec in family.inputs(found, "fp16")} == {"float16"}
    assert {spec.dtype for spec in family.outputs(found, "fp16")} == {"float32"}


def test_folders_of_before_diffusers_0_12(tmp_path: Path) -> None:
    """The published Stable Diffusion 1.x VAEs name their attention query, key, value and proj_attn."""
    model = vae_folder(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for name in list(state):
        for now, then in old.items():
            if ".attentions." in name and f".{now}." in name:
                state[name.replace(f".{now}.", f".{then}.")] = state.pop(name)
    assert any(".proj_attn." in name for name in state)
    save_file(state, file)
    latent = noise(1, 4, 4, 4)
    want = model.decode(latent / 0.18215).sample
    assert_close(DECODER.load(DECODER.inspect(tmp_path, {}))(latent).numpy(), want)


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_single_files(tmp_path: Path, kind: str, prefix: str) -> None:
    model = vae_folder(tmp_path / "vae", kind, block_out_channels=(32, 64, 96), layers_per_block=2)
    state = original_vae(model, prefix)
    if prefix:
        state["model.diffusion_model.out.2.bias"] = torch.zeros(4)
        state["conditioner.embedders.0.x"] = torch.zeros(1)
    state[f"{prefix}loss.logvar"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    found = DECODER.inspect(tmp_path / "model.safetensors", {})
    assert found.config["scaling"] == (1.0 if kind == "vq" else 0.13025 if prefix else 0.18215)
    scaling = float(found.config["scaling"])
    latent = noise(1, model.config.latent_channels, 4, 4)
    assert_close(DECODER.load(found)(latent).numpy(), model.decode(latent / scaling).sample)
    image = noise(1, 3, 16, 16)
    mean, _ = ENCODER.load(ENCODER.inspect(tmp_path / "model.safetensors", {"scaling": 1.0}))(image)
    encoded = model.encode(image)
    assert_close(mean.numpy(), encoded.latent_dist.mean if kind == "kl" else encoded.latents)
    state[f"{prefix}encoder.down.1.attn.0.q.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"down\.1\.attn\.0\.q\.weight is no tensor of an autoencoder"):
        DECODER.load(DECODER.inspect(tmp_path / "model.safetensors", {}))


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    vae_folder(tmp_path / "vae", levels=4, sample_size=64)
    found = DECODER.inspect(tmp_path, {})
    assert (found.scaling, found.shift, found.latent) == (0.18215, 0.0, (4, 8, 8))
    assert found.config["force_upcast"] is True
    assert [str(spec) for spec in DECODER.outputs(found, "fp32")] == ["image float32[B, 3, 8*H, 8*W]"]
    assert DECODER.inspect(tmp_path, {"scaling": 0.5, "shift": 0.25}).config["shift"] == 0.25


def test_what_is_refused(tmp_path: Path) -> None:
    vae_folder(tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "latents_mean": [0.1] * 4}))
    with pytest.raises(BadCheckpoint, match="latents_mean is"):
        DECODER.inspect(tmp_path, {})
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    with pytest.raises(BadCheckpoint, match="do not fit their configuration"):
        DECODER.load(DECODER.inspect(tmp_path, {}))
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderDC"}))
    with pytest.raises(BadCheckpoint, match="looks like a AutoencoderDC"):
        DECODER.inspect(tmp_path / "vae", {})
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"scaling is 0\.0"):
        DECODER.inspect(tmp_path, {"scaling": 0.0})
    save_file({"layers.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BadCheckpoint, match="is no autoencoder"):
        DECODER.inspect(tmp_path / "other.safetensors", {})
    with pytest.raises(BadCheckpoint, match="nothing: it does not exist"):
        DECODER.inspect(tmp_path / "nowhere", {})
