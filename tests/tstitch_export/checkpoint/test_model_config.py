"""What configurations say of a model is in its range, or refused with the file, the key and the value."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.folder import model_folder, read_json
from tstitch_export.checkpoint.pipeline import read_pipeline

VAE = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "shift_factor": None, "latents_mean": None}


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def test_a_pipeline_within_the_ranges(tmp_path: Path) -> None:
    write(tmp_path / "vae/config.json", VAE)
    assert read_pipeline(tmp_path).scaling == 0.5
    write(tmp_path / "vae/config.json", {**VAE, "scaling_factor": None})
    assert read_pipeline(tmp_path).scaling == 0.18215


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scaling_factor": 0}, "'scaling_factor' is 0; allowed is from 1e-06 to 1000000.0"),
        ({"scaling_factor": -1.0}, "'scaling_factor' is -1.0"),
        ({"scaling_factor": float("inf")}, "'scaling_factor' is inf"),
        ({"scaling_factor": "1"}, "'scaling_factor': expected"),
        ({"shift_factor": 1e30}, "'shift_factor' is 1e+30"),
        ({"latent_channels": 10**9}, "'latent_channels' is 1000000000; allowed is from 1 to 4096"),
        ({"latent_channels": 0}, "'latent_channels' is 0"),
        ({"sample_size": [1, 2, 3]}, "'sample_size' has 3 entries"),
        ({"block_out_channels": [64] * 60}, "'block_out_channels' has 60 entries; allowed are 1 to 16"),
        ({"block_out_channels": []}, "'block_out_channels' has 0 entries"),
        ({"layers_per_block": 10**6}, "'layers_per_block' is 1000000; allowed is from 0 to 256"),
        ({"layers_per_block": [2, 10**6]}, "'layers_per_block.1' is 1000000"),
        ({"transformer_layers_per_block": [[1] * 100]}, "'transformer_layers_per_block.0' has 100 entries"),
        ({"norm_num_groups": 0}, "'norm_num_groups' is 0"),
        ({"layer_norm_eps": -1}, "'layer_norm_eps' is -1"),
        ({"num_hidden_layers": 2.5}, "'num_hidden_layers': expected"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write(tmp_path / "vae/config.json", {**VAE, **change})
    with pytest.raises(BadCheckpoint, match=re.escape(problem)) as caught:
        read_pipeline(tmp_path)
    assert "vae/config.json" in caught.value.message
    with pytest.raises(BadCheckpoint, match=re.escape(problem)):
        model_folder(tmp_path, ("vae",), ("AutoencoderKL",), what="is no autoencoder", hint="give one")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ('"beta_start": NaN', "which JSON does not know"),
        ('"beta_start": 0', "beta_start is 0"),
        ('"beta_start": -5', "beta_start is -5"),
        ('"beta_end": 5', "beta_end is 5"),
        ('"beta_end": Infinity', "beta_end is inf"),
        ('"num_train_timesteps": 1000000000', "num_train_timesteps is 1000000000"),
        (f'"num_train_timesteps": {"9" * 5000}', "a number of 5,000 digits"),
        (f'"x": {"[" * 5000}', "nested deeper"),
    ],
    ids=lambda text: text[:30],
)
def test_schedulers_out_of_range_are_refused(change: str, problem: str, tmp_path: Path) -> None:
    write(tmp_path / "scheduler/scheduler_config.json", f'{{"_class_name": "DDIMScheduler", {change}}}')
    with pytest.raises(BadCheckpoint, match=re.escape(problem)) as caught:
        read_pipeline(tmp_path)
    assert "scheduler_config.json" in caught.value.message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "gone.json") is None
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    write(tmp_path / "list.json", [1])
    for name, problem in (("pipe", "a pipe"), ("loop", "Too many levels"), ("list", "no JSON object")):
        with pytest.raises(BadCheckpoint, match=problem):
            read_json(tmp_path / f"{name}.json")
