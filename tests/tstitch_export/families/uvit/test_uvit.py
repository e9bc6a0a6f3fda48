"""Family ``uvit``: the published layout, the paper's equations, both times, and refusal of everything else."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support import uvits
from support.exports import network_plan, onnx_of
from support.uvits import uvit_checkpoint, uvit_model
from tstitch_engines.errors import BadCheckpoint, BadInput, UnknownName
from tstitch_export.families import open_family
from tstitch_export.families.base import Scalar
from tstitch_export.families.uvit.layout import (
    NOISE,
    PUBLISHED_SIZES,
    UViTConfig,
    config_from_shapes,
    expected_shapes,
    time_of,
)
from tstitch_export.families.uvit.model import network_time
from tstitch_trt.solvers.noise_schedule import NoiseSchedule

UVIT = open_family("uvit")
TINY: dict[str, Scalar] = {"num_heads": 4, "time": "discrete"}


def test_parameter_names_are_the_published_ones() -> None:
    assert set(uvit_model(depth=3).state_dict()) == set(uvits.PUBLISHED_NAMES)


@pytest.mark.parametrize(
    ("letter", "size", "patch", "conv", "millions"),  # arXiv 2209.12152, table 1
    [("S", 32, 2, True, 44), ("M", 64, 4, True, 131), ("L", 32, 2, True, 287), ("H", 32, 2, False, 501)],
)
def test_published_sizes_are_read_from_shapes(letter: str, size: int, patch: int, conv: bool, millions: int) -> None:
    depth, width = PUBLISHED_SIZES[letter]
    heads = {"S": 8, "M": 12, "L": 16, "H": 16}[letter]
    config = UViTConfig(
        depth=depth, width=width, heads=heads, patch=patch, size=size, channels=4, labels=1001, conv=conv
    )
    shapes = expected_shapes(config)
    assert config_from_shapes(shapes, name="x", heads=None) == config
    learned = sum(math.prod(shape) for name, shape in shapes.items() if name != "label_emb.weight")
    assert abs(learned / 1e6 - millions) < 1.5
    assert time_of(None, config, "x") == ("discrete" if letter == "H" else "continuous")


@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_time": True, "conv": False}, {"qkv_bias": True, "depth": 7}],
    ids=["plain", "mlp-time", "qkv-bias"],
)
@pytest.mark.parametrize("time", ["discrete", "continuous"])
def test_the_module_equals_the_equations_of_the_paper(tmp_path: Path, changes: dict[str, Any], time: str) -> None:
    path = tmp_path / "nnet_ema.pth"
    uvit_checkpoint(path, **changes)
    inspection = UVIT.inspect(path, {**TINY, "time": time})
    sample, _, labels = UVIT.example(inspection, batch=3, seed=0)
    timestep = torch.tensor([0.0, 481.25, 999.0])
    with torch.no_grad():
        got = UVIT.load(inspection).double()(sample.double(), timestep, labels).numpy()
    state = {name: tensor.double().numpy() for name, tensor in torch.load(path, weights_only=True).items()}
    told = network_time(timestep, time).double().numpy()  # type: ignore[arg-type]
    want = uvits.forward(state, 4, sample.double().numpy(), told, labels.tolist())
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_the_network_is_told_the_time_it_was_trained_with() -> None:
    """Discrete: levels are counted from 1. Continuous: the VP SDE has the same signal at that time, and it is x 999."""
    steps = np.arange(1000)
    assert np.array_equal(network_time(torch.arange(1000), "discrete").numpy(), steps + 1)
    told = network_time(torch.arange(1000), "continuous").double().numpy()
    t = told / 999
    signal = np.exp(-(0.1 * t + (20 - 0.1) * t**2 / 2))  # arXiv 2011.13456, eq. 33
    want = NoiseSchedule.from_spec(NOISE["continuous"]).alphas_cumprod
    assert np.abs(np.log(signal) - np.log(want)).max() < 1e-5
    assert abs(told[-1] - 999) < 4
    between = network_time(torch.tensor([500.5]), "continuous").item()
    assert told[500] < between < told[501]


def test_inspect_reads_everything_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "nnet_ema.safetensors"
    uvit_checkpoint(path)
    found = UVIT.inspect(path, {"num_heads": "4", "time": "continuous"})
    assert found.latent == (4, 8, 8)
    assert (found.labels, found.learned_variance, found.layout) == (11, False, "published")
    assert (found.config["depth"], found.config["width"], found.config["heads"]) == (5, 32, 4)
    assert found.noise == NOISE["continuous"]
    assert UVIT.inspect(path, TINY).noise == NOISE["discrete"]
    assert found.libraries == ("torch", "onnx", "onnxscript")


@pytest.mark.parametrize(
    ("time", "precision"),
    [("discrete", "fp32"), ("continuous", "fp32"), ("discrete", "fp16"), ("continuous", "bf16")],
)
def test_onnx_equals_the_module(tmp_path: Path, precision: Any, time: str) -> None:
    """The exporter compares on ONNX Runtime. The discrete ones are those of the tests of every family's engines, the
    continuous one in float32 is that of the pairs (``support/class_pairs.py``)."""
    paired = (time, precision) == ("continuous", "fp32")
    path, heads = tmp_path / ("s.pth" if paired else "uvit.safetensors"), 4 if paired else 2
    uvit_checkpoint(path, depth=3, heads=heads, mlp_time=precision == "bf16")
    check = onnx_of(network_plan("uvit", path, {"num_heads": heads, "time": time}, precision), tmp_path / "out").check
    assert check is not None
    assert check.rel_l2 < {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-3}[precision]


LOOKALIKES = {
    "a DiT": ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"],
    "a UNet": ["conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a class-conditional latent diffusion model": [
        "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.embedding.weight",
    ],
    "something unknown": ["layer1.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(LOOKALIKES))
def test_other_checkpoints_are_called_what_they_are(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in LOOKALIKES[kind]}, path)
    with pytest.raises(BadCheckpoint, match=f"is no U-ViT: it looks like {kind}"):
        UVIT.inspect(path, TINY)
    if kind == "a DiT":
        save_file(uvit_model().state_dict(), path)
        with pytest.raises(BadCheckpoint, match="is no DiT: it looks like a U-ViT"):
            open_family("dit").inspect(path, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("in_blocks.1.attn.qkv.weight"), r"lacks 1 tensors, e.g. in_blocks.1.attn.qkv.weight"),
        (lambda s: s.pop("out_blocks.1.skip_linear.weight"), "lacks 1 tensors, e.g. out_blocks.1.skip_linear"),
        (lambda s: s.update({"mid_block.mlp.fc2.bias": torch.zeros(7)}), r"of shape \[7\]; allowed is \[32\]"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 tensors that no U-ViT has, e.g. extra"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 16, 32)), r"\[1, 16, 32\]; allowed is \[1, 2 \+ n\*n, width\]"),
        (lambda s: s.pop("label_emb.weight"), "looks like an unconditional one"),
        (lambda s: (s.pop("label_emb.weight"), s.update({"context_embed.weight": torch.zeros(1)})), "a text-to-image"),
    ],
)
def test_incomplete_uvits_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    state = dict(uvit_model().state_dict())
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=words):
        UVIT.inspect(tmp_path / "model.safetensors", TINY)


def test_what_shapes_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    uvit_checkpoint(path)
    with pytest.raises(BadCheckpoint, match="8 at width 512") as caught:
        UVIT.inspect(path, {"time": "discrete"})
    assert "num_heads" in caught.value.hint
    with pytest.raises(BadCheckpoint, match="5 blocks and width 32 is none of the published sizes") as caught:
        UVIT.inspect(path, {"num_heads": 4})
    assert "time=discrete" in caught.value.hint
    with pytest.raises(BadCheckpoint, match="time is 'later'; allowed are discrete, continuous"):
        UVIT.inspect(path, {**TINY, "time": "later"})
    with pytest.raises(BadCheckpoint, match="5 attention heads do not divide"):
        UVIT.inspect(path, {**TINY, "num_heads": 5})
    with pytest.raises(BadInput, match="'four'"):
        UVIT.inspect(path, {**TINY, "num_heads": "four"})
    with pytest.raises(UnknownName, match="did you mean 'num_heads'"):
        UVIT.inspect(path, {"numheads": 4})
    with pytest.raises(BadCheckpoint, match="is a folder"):
        UVIT.inspect(tmp_path, TINY)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"args": {"noise_schedule": "sigmoid"}}, "noise that can't be expressed"),
        ({"args": {"noise_schedule": "linear"}}, r"noise is linear, .* and scaled-linear, .* by its time \(discrete\)"),
        ({"ztsnr": torch.zeros(0)}, r"zero_snr is True by its training state \(ztsnr = True\) and False by its time"),
    ],
)
def test_a_file_that_contradicts_its_time(
    more: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``time`` is what says a U-ViT's noise: hints name it, and where the user says it the file's word counts less."""
    monkeypatch.setitem(PUBLISHED_SIZES, "H", (5, 32))  # so that the size of the tiny one tells
    torch.save({"state_dict": uvit_model().state_dict(), **more}, path := tmp_path / "x.pth")
    with pytest.raises(BadCheckpoint, match=words) as caught:
        UVIT.inspect(path, {"num_heads": 4})
    assert "MEMBER.time=continuous" in caught.value.hint
    assert "MEMBER.noise" not in caught.value.hint
    assert "MEMBER.zero_snr" not in caught.value.hint
    found = UVIT.inspect(path, TINY)
    assert (found.noise, found.trained.zero_snr) == (NOISE["discrete"], False)


def test_bad_files(tmp_path: Path) -> None:
    state = dict(uvit_model().state_dict())
    state["mid_block.mlp.fc1.weight"][3, 3] = math.nan
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"mid_block\.mlp\.fc1\.weight holds NaN"):
        UVIT.load(UVIT.inspect(tmp_path / "model.safetensors", TINY))
    torch.save({**uvit_model().state_dict(), "config": os.getcwd}, tmp_path / "model.pth")
    with pytest.raises(BadCheckpoint, match="could run code"):
        UVIT.inspect(tmp_path / "model.pth", TINY)
