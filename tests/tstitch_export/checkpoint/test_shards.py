"""Weights in several files, as ``save_pretrained`` writes them beyond a size: read as diffusers and transformers do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.dits import diffusers_folder
from support.ldms import ldm_folder
from support.tiny_families import clip_text_folder, controlnet_folder, unet_folder, vae_folder
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.families import open_family

SMALL = "100KB"


def text(folder: Path) -> Any:
    return clip_text_folder(folder, "text_encoder_2", projection=16)


def ldm(folder: Path) -> Any:
    return ldm_folder(folder)[0]


# family -> (what writes it and returns the module, the module's folder)
MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "clip-text": (text, "text_encoder_2"),
    "vae-decoder": (lambda folder: vae_folder(folder / "vae"), "vae"),
    "vae-encoder": (lambda folder: vae_folder(folder / "vae"), "vae"),
    "controlnet": (lambda folder: controlnet_folder(folder / "controlnet"), "controlnet"),
    "unet-sd": (unet_folder, "unet"),
    "dit": (lambda folder: diffusers_folder(folder / "transformer"), "transformer"),
    "ldm": (ldm, "unet"),
}


@pytest.mark.parametrize("name", MODELS)
def test_shards_are_the_same_network(name: str, tmp_path: Path) -> None:
    write, part = MODELS[name]
    module = write(tmp_path)
    family, folder = open_family(name), tmp_path / part
    options = {"dynamic": True} if name == "ldm" else {}
    whole = family.inspect(tmp_path, options)
    inputs = family.example(whole, batch=2, seed=1)
    with torch.no_grad():
        want = family.load(whole)(*inputs)
    (whole.files[-1]).unlink()
    module.save_pretrained(folder, max_shard_size=SMALL)
    loaded = type(module).from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in module.state_dict().items()), "as diffusers reads it"

    found = family.inspect(tmp_path, options)
    index, *_ = folder.glob("*.index.json")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert found.files == (*whole.files[:-1], *shards, index), "each decides what is built"
    assert (found.config, found.latent) == (whole.config, whole.latent)
    with torch.no_grad():
        got = family.load(found)(*inputs)
    for left, right in zip(*((out,) if isinstance(out, torch.Tensor) else out for out in (got, want)), strict=True):
        assert torch.equal(left, right)


def test_a_lora_on_a_sharded_text_encoder(tmp_path: Path) -> None:
    from support.tiny_families import lora_file

    encoder = clip_text_folder(tmp_path)
    lora = lora_file(tmp_path / "style.safetensors", unet_folder(tmp_path / "other"), text=encoder)
    family = open_family("clip-text")
    state = load_file(lora)
    save_file({key: tensor for key, tensor in state.items() if key.startswith("lora_te")}, lora)
    want = family.load(family.inspect(tmp_path, {"lora": str(lora)})).state_dict()
    (tmp_path / "text_encoder/model.safetensors").unlink()
    encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size=SMALL)
    found = family.inspect(tmp_path, {"lora": str(lora)})
    assert lora in found.files
    got = family.load(found).state_dict()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def test_a_whole_file_goes_before_shards_and_full_precision_before_half(tmp_path: Path) -> None:
    module = vae_folder(tmp_path)
    family = open_family("vae-decoder")
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = whole.read_bytes()
    half = {key: tensor.half() for key, tensor in load_file(whole).items()}
    whole.unlink()
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert family.inspect(tmp_path, {}).files[-1].name == "diffusion_pytorch_model.fp16.safetensors"
    module.save_pretrained(tmp_path, max_shard_size=SMALL)
    assert family.inspect(tmp_path, {}).files[-1].name == "diffusion_pytorch_model.safetensors.index.json"
    whole.write_bytes(kept)
    assert family.inspect(tmp_path, {}).files[-1] == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: {}, r"lists no files \(no weight_map\)"),
        (lambda table: {"weight_map": []}, r"lists no files \(no weight_map\)"),
        (lambda table: {"weight_map": {**table, "x": "../x.safetensors"}}, r"names \.\./x\.safetensors, which is not"),
        (lambda table: {"weight_map": {**table, "x": "gone.safetensors"}}, r"names gone\.safetensors, which is not"),
        (lambda table: {"weight_map": {**table, "more": next(iter(table.values()))}}, "lists more, which none of its"),
    ],
)
def test_damaged_indices(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    module = vae_folder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    module.save_pretrained(tmp_path, max_shard_size=SMALL)
    (index,) = tmp_path.glob("*.index.json")
    assert read_checkpoint(index).shapes.keys() == module.state_dict().keys()
    assert read_checkpoint(index).arrays().keys() == module.state_dict().keys()
    index.write_text(json.dumps(change(json.loads(index.read_text())["weight_map"])))
    with pytest.raises(BadCheckpoint, match=words) as caught:
        read_checkpoint(index)
    assert "copy" in caught.value.hint


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_wrapped_module_are_the_same_network(name: str, tmp_path: Path) -> None:
    """A compiled and data-parallel module saved as a variant alone, pickled: what every family loads is the same."""
    write, part = MODELS[name]
    write(tmp_path)
    family, folder = open_family(name), tmp_path / part
    options = {"dynamic": True} if name == "ldm" else {}
    whole = family.inspect(tmp_path, options)
    want = family.load(whole).state_dict()
    state = load_file(whole.files[-1])
    whole.files[-1].unlink()
    stem = whole.files[-1].name.partition(".")[0]
    stem = "pytorch_model" if stem == "model" else stem
    torch.save({f"module._orig_mod.{key}": tensor for key, tensor in state.items()}, folder / f"{stem}.bf16.bin")
    found = family.inspect(tmp_path, options)
    got = family.load(found).state_dict()
    assert (found.config, found.latent, found.files[-1].name) == (whole.config, whole.latent, f"{stem}.bf16.bin")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def test_a_whole_pipeline_in_a_training_state(tmp_path: Path) -> None:
    """Lightning's state of one, with an average of all of it: UNet, text encoder and VAE are found in it."""
    from support.tiny_checkpoints import planned, said, single_file, text_recipe

    state = load_file(single_file(tmp_path / "model.safetensors"))
    other = {key: tensor + 1 for key, tensor in state.items()}
    wrapped = {f"ema_model.module.{key}": tensor for key, tensor in state.items()}
    wrapped |= {f"online_model.{key}": tensor for key, tensor in other.items()}
    torch.save({"state_dict": wrapped, "callbacks": {}, "global_step": 1000}, tmp_path / "last.ckpt")
    recipe = text_recipe(tmp_path / "pair.toml")
    tokenizer = {"text_encoder.tokenizer": str(tmp_path / "parts/tokenizer"), "small.prediction": "eps"}
    options = {**tokenizer, "large.prediction": "eps"}
    members = dict.fromkeys(("small", "large"), tmp_path / "last.ckpt")
    plan = planned(recipe, members=members, options=options)
    assert set(plan.parts) == {"text_encoder", "vae_decoder", "vae_encoder"}
    said(plan, "last.ckpt: of the models in it the one under 'ema_model.module.' is taken, not 'online_model.'")
    want = planned(recipe, members=dict.fromkeys(members, tmp_path / "model.safetensors"), options=options)
    for ours, theirs in zip(plan.networks, want.networks, strict=True):
        got, expected = (each.family.load(each.inspection).state_dict() for each in (ours, theirs))
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
