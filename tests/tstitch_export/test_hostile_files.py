"""Files of a pipeline, recipes and LoRAs that somebody altered: planned, or refused with an error of ours, at once."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import zipfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from support.hostile import altered, altered_bytes, dumps, only_our_errors
from support.tiny_checkpoints import SD, pieces, planned, text_recipe
from support.tiny_families import lora_file, unet_folder
from tstitch_engines.errors import BadInput
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.checkpoint.stand_ins import STAND_INS
from tstitch_export.families import open_family
from tstitch_export.families.base import LoraUse
from tstitch_export.families.lora.fuse import lora_deltas
from tstitch_export.planning.recipe import load_recipe

FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pieces(tmp_path_factory.mktemp("whole") / "sd", "least", **SD)


def hostile(data: st.DataObject, good: Path) -> bytes:
    """The content of ``good`` after somebody was at it."""
    content = good.read_bytes()
    if good.suffix == ".json" and data.draw(st.integers(0, 3)):
        return dumps(data.draw(altered(json.loads(content))))
    if good.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        if data.draw(st.booleans()):
            header = dumps(data.draw(altered(json.loads(content[8:end]))))
            return len(header).to_bytes(8, "little") + header + content[end:]
        return data.draw(altered_bytes(content[:end])) + content[end:]
    return data.draw(altered_bytes(content))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("scheduler/scheduler_config.json", {"beta_start": float("nan")}, "NaN"),
        ("scheduler/scheduler_config.json", {"beta_start": 0}, "beta_start is 0"),
        ("scheduler/scheduler_config.json", {"beta_start": -5}, "beta_start is -5"),
        ("scheduler/scheduler_config.json", {"beta_end": 5}, "beta_end is 5"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
        ("vae/config.json", {"scaling_factor": 0}, "'scaling_factor' is 0"),
        ("vae/config.json", {"block_out_channels": [2**30]}, "'block_out_channels.0' is 1073741824"),
        ("unet/config.json", {"layers_per_block": 10**6}, "'layers_per_block' is 1000000"),
        ("unet/config.json", {"sample_size": 10**9}, "'sample_size' is 1000000000"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000"),
        ("tokenizer/vocab.json", {"a": 10**12}, "no id of its own"),
    ],
)
def test_absurd_configs_are_refused_with_the_value(
    name: str, change: dict[str, Any], problem: str, pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(pipeline, tmp_path / "sd")
    file = tmp_path / "sd" / name
    file.write_bytes(dumps(json.loads(file.read_bytes()) | change))
    with pytest.raises(BadInput, match=problem) as caught:
        planned(text_recipe(tmp_path / "pair.toml"), members={"small": pipeline, "large": tmp_path / "sd"})
    assert file.name in caught.value.message


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_pipeline_of_altered_files(data: st.DataObject, pipeline: Path) -> None:
    changed = pipeline.parent / "hostile"
    shutil.rmtree(changed, ignore_errors=True)
    shutil.copytree(pipeline, changed)
    recipe = text_recipe(pipeline.parent / "pair.toml")
    name = data.draw(st.sampled_from(FILES))
    (changed / name).write_bytes(hostile(data, pipeline / name))
    only_our_errors(lambda: planned(recipe, members={"small": pipeline, "large": changed}))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_altered_recipes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = text_recipe(tmp_path_factory.getbasetemp() / "hostile.toml")
    text = path.read_text()
    lines = text.splitlines()
    for _ in range(data.draw(st.integers(0, 2))):
        number = data.draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[number].partition(" = ")
        value = data.draw(
            st.sampled_from(["nan", "-1", "0", "9" * 50, "1e300", '"x"', "[]", "{}", "true", "1979-05-27"])
        )
        lines[number] = (
            f"{key} = {value}" if equals else data.draw(st.sampled_from(["", "[x.y]", "[[latent]]", "[members]"]))
        )
    content = "\n".join(lines).encode()
    path.write_bytes(content if data.draw(st.booleans()) else data.draw(altered_bytes(content)))
    only_our_errors(lambda: load_recipe(path))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("lora")
    module = unet_folder(folder, "least")
    family = open_family("unet-sd")
    inspection = family.inspect(folder, {})
    lora_file(folder / "style.safetensors", module)
    return folder / "style.safetensors", family.lora_target(inspection)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_altered_loras(data: st.DataObject, lora: tuple[Path, Any]) -> None:
    good, target = lora
    path = good.with_name("hostile.safetensors")
    path.write_bytes(hostile(data, good))

    def use() -> None:
        for _, delta in lora_deltas(LoraUse(path), target, model="model"):
            delta()

    only_our_errors(use)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_altered_checkpoints(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    import torch

    good = tmp_path_factory.getbasetemp() / "good.safetensors"
    if not good.exists():
        kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
        save_file({str(kind): torch.ones(2, 3).to(kind) for kind in kinds}, good, metadata={"a": "b"})
    path = good.with_name("hostile.safetensors")
    path.write_bytes(hostile(data, good))
    only_our_errors(lambda: [read() for read in read_checkpoint(path).arrays().values()])


@pytest.mark.parametrize("called", [b"R", b"\x81"], ids=["call", "new"])
def test_what_stands_in_for_a_known_name_runs_nothing(called: bytes, tmp_path: Path) -> None:
    """Whatever a pickle does with such a name: its library is not imported, and what comes of it is no object of it."""
    path, before = tmp_path / "a.pt", set(sys.modules)
    libraries = {each.__module__.partition(".")[0] for each in STAND_INS} - {"builtins", "typing", "torch", "numpy"}
    kinds: dict[type, list[tuple[str, str]]] = {}
    for each in STAND_INS:
        kinds.setdefault(each.__mro__[1], []).append((each.__module__, each.__qualname__))
    for names in kinds.values():
        for arguments in ((), ({"a": 1},), ("f8", False, True), ([1, 2],), (b"12345678", None)):
            for state in (None, {"__class__": 1}, (3, "<", None), {"__setstate__": 1}):
                objects = b""
                for module, last in names:
                    objects += f"c{module}\n{last}\n".encode() + _inside(arguments) + called
                    objects += b"" if state is None else _inside(state) + b"b"
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("a/version", "3\n")
                    archive.writestr("a/data.pkl", b"\x80\x02}" + _inside("x") + b"](" + objects + b"es.")
                error = only_our_errors(lambda: read_checkpoint(path))
                assert error is not None
                assert "holds no state dict" in error.message or "is damaged" in error.message
                if len(names) > 50:  # those that are read as nothing take anything
                    assert "holds no state dict" in error.message
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in libraries}


def _inside(value: object) -> bytes:
    """``value`` as it stands within a pickle."""
    return pickle.dumps(value, 2)[2:-1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_altered_training_states(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The pickle inside, and the older format, which is one stream."""
    import torch

    good, path = tmp_path_factory.getbasetemp() / "good.pt", tmp_path_factory.getbasetemp() / "hostile.pt"
    weights = {"x_embedder.proj.weight": torch.ones(2, 3), "pos_embed": torch.ones(2, 3).half()}
    state = {"ema": weights, "args": Namespace(a=1, b=Path("x")), "n": np.float32(3), "d": defaultdict(dict, a={1: 2})}
    legacy = data.draw(st.booleans())
    torch.save(state, good, _use_new_zipfile_serialization=not legacy)
    if legacy:
        path.write_bytes(data.draw(altered_bytes(good.read_bytes())))
    else:
        with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as changed:
            for name in archive.namelist():
                part = archive.read(name)
                changed.writestr(name, data.draw(altered_bytes(part)) if name.endswith("data.pkl") else part)
    only_our_errors(lambda: [read() for read in read_checkpoint(path).arrays().values()])
