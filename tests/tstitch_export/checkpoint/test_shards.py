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
