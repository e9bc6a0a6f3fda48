"""Which file of a folder holds the weights: variants, shards, both spellings of an index, averages beside."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_families import unet_folder
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.conventions import NOTHING_KNOWN
from tstitch_export.checkpoint.folder import model_folder, weights_file
from tstitch_export.families import open_family
from tstitch_trt.pipeline.checkpoint import _log_notes, path_hash

STEM = "diffusion_pytorch_model"


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *(f"{STEM}{variant}.{ending}" for variant in ("", ".fp32", ".fp16", ".bf16", ".ema", ".non_ema", ".mine")
          for ending in ("safetensors", "bin")),
        f"{STEM}.safetensors.index.json", f"{STEM}.bin.index.json",
        f"{STEM}.bf16.safetensors.index.json", f"{STEM}.safetensors.index.bf16.json", f"{STEM}.bin.index.non_ema.json",
        "model.fp16.safetensors",
    ],
)  # fmt: skip
def test_a_folder_with_one_variant_alone(name: str, tmp_path: Path) -> None:
    touched(tmp_path, name, "config.json", "optimizer.bin", f"{STEM}.fp16-00001-of-00002.safetensors")
    assert weights_file(tmp_path, (STEM, "model")) == tmp_path / name


def test_of_several_the_first_of_a_stated_order_is_taken(tmp_path: Path) -> None:
    order = [
        f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}.bin", f"{STEM}.fp32.bin",
        f"{STEM}.ema.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.safetensors.index.fp16.json",
        f"{STEM}.bf16.safetensors", f"{STEM}.non_ema.bin", f"{STEM}.mine.safetensors",
    ]  # fmt: skip
    touched(tmp_path, *order)
    for name in order:
        assert weights_file(tmp_path, [STEM]).name == name
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        ([f"{STEM}.mine.bin", f"{STEM}.yours.bin"], "holds the variants mine, yours of", "a folder of its own"),
        ([f"{STEM}-00001-of-00002.safetensors"], f"has no {STEM}.safetensors", r"index too \(\*\.index\.json\)"),
        (["optimizer.bin"], f"has no {STEM}.safetensors", "copy the weights too"),
    ],
)
def test_what_is_refused(names: list[str], words: str, hint: str, tmp_path: Path) -> None:
    touched(tmp_path, *names)
    with pytest.raises(BadCheckpoint, match=words) as caught:
        weights_file(tmp_path, [STEM])
    assert re.search(hint, caught.value.hint)


def test_shards_of_a_wrapped_model_are_unwrapped_together(tmp_path: Path) -> None:
    """The shard that does not have what tells the model loses the same prefix."""
    state = {"x_embedder.proj.weight": torch.ones(2, 3), "pos_embed": torch.ones(2, 3)}
    save_file({f"module.model.{key}": tensor for key, tensor in state.items()}, tmp_path / "a.safetensors")
    save_file({"module.model.blocks.0.mlp.fc1.bias": torch.ones(4)}, tmp_path / "b.safetensors")
    table = {f"module.model.{key}": "a.safetensors" for key in state} | {
        "module.model.blocks.0.mlp.fc1.bias": "b.safetensors"
    }
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert read_checkpoint(tmp_path / "x.safetensors.index.json").shapes.keys() == {*state, "blocks.0.mlp.fc1.bias"}


def test_the_shards_of_an_index_are_what_a_model_is_made_of(tmp_path: Path) -> None:
    """Given as the index itself: other weights under the same names are another model."""
    module = unet_folder(tmp_path, "sd", cross_attention_dim=768, attention_head_dim=8)
    module.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    (index,) = (tmp_path / "shards").glob("*.index.json")
    (tmp_path / "shards/config.json").rename(tmp_path / "config.json")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    assert open_family("unet-sd").inspect(index, {}).files == (*shards, index)
    before = path_hash(index)
    state = load_file(shards[0])
    save_file({key: tensor + 1 for key, tensor in state.items()}, shards[0])
    assert path_hash(index) != before


@pytest.mark.parametrize("average", ["unet_ema", "ema_unet"])
def test_the_state_of_a_training_with_an_average(
    average: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers' training scripts write ``unet`` and ``unet_ema`` beside each other, whose config has more keys."""
    family = open_family("unet-sd")
    unet_folder(tmp_path, "least", seed=1)
    averaged = unet_folder(tmp_path, "least", part=average, seed=2)
    file = tmp_path / average / "config.json"
    own = {"decay": 0.9999, "inv_gamma": 1.0, "power": 2 / 3, "optimization_step": 100_000, "update_after_step": 0}
    own |= {"min_decay": 0.0, "use_ema_warmup": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    found = family.inspect(tmp_path, {})
    assert found.path == tmp_path / average
    assert found.notes == (f"the moving average {average} is taken, not unet",)
    state = family.load(found).unet.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(state[key], tensor) for key, tensor in averaged.state_dict().items())  # type: ignore[operator]
    assert "optimization_step" not in model_folder(tmp_path, ("unet",), {"UNet2DConditionModel"}, what="", hint="")[1]
    with caplog.at_level(logging.INFO):
        _log_notes(tmp_path, NOTHING_KNOWN)
    assert f"the moving average {average} is taken, not unet" in caplog.text
    before = path_hash(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "decay": 0.5}))
    assert path_hash(tmp_path) != before, "a loaded pipeline's small member is made of the same folder"
    (tmp_path / "model_index.json").write_text("{}")  # of a pipeline the unet is what it draws with
    assert family.inspect(tmp_path, {}).path == tmp_path / "unet"
