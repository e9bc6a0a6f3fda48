"""A config.json from a stranger asks for layers, widths and sizes: no more than its weights have is ever made."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.dits import diffusers_folder
from support.ldms import ldm_folder
from support.tiny_families import clip_text_folder, controlnet_folder, unet_folder, vae_folder
from tstitch_engines.errors import BadCheckpoint, TStitchError
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.families import open_family

FAMILIES = {
    "dit": "dit/transformer",
    "ldm": "ldm/unet",
    "unet-sd": "sd/unet",
    "unet-sdxl": "sdxl/unet",
    "controlnet": "controlnet",
    "vae-decoder": "vae",
    "clip-text": "clip/text_encoder",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    diffusers_folder(folder / "dit")
    ldm_folder(folder / "ldm")
    unet_folder(folder / "sd", "least")
    unet_folder(folder / "sdxl", "xl-least")
    controlnet_folder(folder / "controlnet", "one", block_out_channels=(32,))
    vae_folder(folder / "vae", levels=2)
    clip_text_folder(folder / "clip", layers=1)
    return folder


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where numbers are in a config."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield path
    elif isinstance(value, (list, dict)):
        for key, part in enumerate(value) if isinstance(value, list) else value.items():
            yield from numbers(part, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    made = value.copy()
    made[path[0]] = put(value[path[0]], path[1:], new)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_makes_more_than_the_weights_have(models: Path, tmp_path: Path, family: str) -> None:
    """Every number of every config in turn: it is refused by name, or means nothing to this family."""
    place = next(
        p for p in (models / FAMILIES[family], (models / FAMILIES[family]).parent) if (p / "config.json").is_file()
    )
    source = models / FAMILIES[family].split("/")[0]
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / place.relative_to(source) / "config.json"
    config, opened, refused = json.loads(file.read_text()), open_family(family), []
    opened.inspect(tmp_path / "model", {})
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in numbers(config):
        for value in (10**6, 10**9, 10**18, 2**200, -(10**9), [10**9, 10**9], [8] * 10_000):
            file.write_text(json.dumps(put(config, path, value)))
            try:
                opened.inspect(tmp_path / "model", {})
            except TStitchError as error:
                refused.append(error.message)
    assert time.monotonic() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert len(refused) > 30


@pytest.mark.parametrize(
    ("family", "key", "value", "words"),
    [
        ("unet-sd", "layers_per_block", 200, "layers_per_block is 200, and the weights hold"),
        ("unet-sd", "block_out_channels", [4000], r"block_out_channels is 4,000, and the largest dimension"),
        ("unet-sd", "block_out_channels", [32] * 14, "block_out_channels has 14 entries; allowed are 12"),
        ("unet-sd", "cross_attention_dim", 900_000, "cross_attention_dim is 900,000"),
        ("unet-sd", "sample_size", 600, "sample_size is 600; allowed is 1 to 512"),
        ("unet-sdxl", "transformer_layers_per_block", 200, "transformer_layers_per_block is 200"),
        ("dit", "num_layers", 200, "num_layers is 200"),
        ("dit", "sample_size", 600, "sample_size is 600"),
        ("dit", "num_attention_heads", 4000, "num_attention_heads is 4,000"),
        ("controlnet", "layers_per_block", 250, "layers_per_block is 250"),
        ("vae-decoder", "layers_per_block", 200, "layers_per_block is 200"),
        ("vae-decoder", "latent_channels", 4000, "latent_channels is 4,000"),
        ("clip-text", "num_hidden_layers", 200, "num_hidden_layers is 200"),
        ("clip-text", "vocab_size", 900_000, "vocab_size is 900,000"),
        ("clip-text", "max_position_embeddings", 900_000, "max_position_embeddings is 900,000"),
    ],
)
def test_the_error_names_the_key_its_value_and_what_there_is(
    models: Path, tmp_path: Path, family: str, key: str, value: Any, words: str
) -> None:
    source = models / FAMILIES[family].split("/")[0]
    shutil.copytree(source, tmp_path / "model")
    file = next((tmp_path / "model").rglob("config.json"))
    for found in (tmp_path / "model").rglob("config.json"):
        if key in json.loads(found.read_text()):
            file = found
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(BadCheckpoint, match=words):
        open_family(family).inspect(tmp_path / "model", {})


def test_a_tensor_that_says_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    for name, tensor in {
        "repeated": torch.ones(1).expand(1 << 20, 1 << 20),
        "sparse": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (1 << 30, 1 << 30), check_invariants=True),
        "nowhere": torch.empty(1 << 20, 1 << 20, device="meta"),
    }.items():
        torch.save({"weight": tensor}, tmp_path / f"{name}.pt")
        with pytest.raises(BadCheckpoint):
            read_checkpoint(tmp_path / f"{name}.pt")


def test_an_empty_tensor_tells_nothing(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.empty(1, 1 << 40, 0), "weight": torch.ones(2)}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").shapes == {"weight": (2,)}
