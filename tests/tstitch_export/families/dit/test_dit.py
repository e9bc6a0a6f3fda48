"""Family ``dit``: the published layout and conventions, diffusers folders, and refusal of everything else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.dits import PUBLISHED_NAMES, diffusers_folder, published_model, published_state
from tstitch_engines.bundle.manifest import NoiseScheduleSpec
from tstitch_engines.errors import BadCheckpoint, BadInput, UnknownName
from tstitch_export.families import open_family
from tstitch_export.families.dit.config import PUBLISHED_HEADS, DiTConfig
from tstitch_export.families.dit.layout import PUBLISHED_SIZES, config_from_shapes, expected_shapes

DIT = open_family("dit")


def test_parameter_names_are_the_published_ones() -> None:
    state = published_state(depth=3)
    assert {name for name in state if not name.startswith(("blocks.1.", "blocks.2."))} == set(PUBLISHED_NAMES)
    for block in ("1", "2"):
        assert {n.replace(f"blocks.{block}.", "blocks.0.") for n in state if n.startswith(f"blocks.{block}.")} == {
            n for n in PUBLISHED_NAMES if n.startswith("blocks.0.")
        }


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(
    ("letter", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)]  # arXiv 2212.09748, table 4, patch 2
)  # fmt: skip
def test_published_sizes_are_read_from_shapes(letter: str, millions: int, patch: int, size: int) -> None:
    depth, width = PUBLISHED_SIZES[letter]
    config = DiTConfig(
        depth=depth, width=width, heads=PUBLISHED_HEADS[width], patch=patch, size=size, channels=4, classes=1000,
        learn_sigma=True,
    )  # fmt: skip
    shapes = expected_shapes(config)
    assert config_from_shapes(shapes, name="x", heads=None) == config
    if patch == 2:
        learned = sum(math.prod(shape) for name, shape in shapes.items() if name != "pos_embed")
        assert abs(learned / 1e6 - millions) < 1


def test_inspect_reads_everything_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ema.safetensors"
    save_file(published_state(), path)
    found = DIT.inspect(path, {"num_heads": 4})
    assert found.latent == (4, 8, 8)
    assert (found.labels, found.learned_variance, found.layout) == (6, True, "published")
    assert found.config["depth"] == 2
    assert found.config["width"] == 32
    assert found.config["heads"] == 4


def test_load_equals_the_module(tmp_path: Path) -> None:
    model = published_model()
    torch.save({"ema": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "model.pt")
    inspection = DIT.inspect(tmp_path / "model.pt", {"num_heads": 4})
    inputs = DIT.example(inspection, batch=3, seed=0)
    with torch.no_grad():
        assert torch.equal(DIT.load(inspection)(*inputs), model(*inputs))


def to_diffusers(state: dict[str, Any], depth: int) -> dict[str, Any]:
    """Published names -> diffusers' names, as its conversion script has them: the embedders go into every block."""
    out = {
        "pos_embed.proj.weight": state["x_embedder.proj.weight"],
        "pos_embed.proj.bias": state["x_embedder.proj.bias"],
        "proj_out_1.weight": state["final_layer.adaLN_modulation.1.weight"],
        "proj_out_1.bias": state["final_layer.adaLN_modulation.1.bias"],
        "proj_out_2.weight": state["final_layer.linear.weight"],
        "proj_out_2.bias": state["final_layer.linear.bias"],
    }
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"transformer_blocks.{index}."
        emb = f"{theirs}norm1.emb."
        out[f"{emb}class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            out[f"{emb}timestep_embedder.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            out[f"{emb}timestep_embedder.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
            out[f"{theirs}norm1.linear.{kind}"] = state[f"{ours}adaLN_modulation.1.{kind}"]
            q, k, v = state[f"{ours}attn.qkv.{kind}"].chunk(3)
            out |= {f"{theirs}attn1.to_{n}.{kind}": x for n, x in (("q", q), ("k", k), ("v", v))}
            out[f"{theirs}attn1.to_out.0.{kind}"] = state[f"{ours}attn.proj.{kind}"]
            out[f"{theirs}ff.net.0.proj.{kind}"] = state[f"{ours}mlp.fc1.{kind}"]
            out[f"{theirs}ff.net.2.{kind}"] = state[f"{ours}mlp.fc2.{kind}"]
    return out


def test_conventions_equal_diffusers() -> None:
    """Position table, timestep features, adaLN order, qkv split and the order of output patches, in one comparison.

    diffusers' two departures from the published model (timestep frequencies, an epsilon) are set back for it.
    """
    from diffusers import DiTTransformer2DModel

    ours = published_model(depth=2, width=32, heads=4)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_diffusers(dict(ours.state_dict()), 2))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.manual_seed(0)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 37.0, 999.0]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        want = theirs(x, timestep=t, class_labels=y).sample
        got = ours(x, t, y)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("form", ["model", "pipeline", "legacy"])
def test_diffusers_folders_equal_diffusers(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "transformer" if form == "pipeline" else tmp_path
    model = diffusers_folder(folder)
    if form == "legacy":
        config = json.loads((folder / "config.json").read_text())
        config["_class_name"] = "Transformer2DModel"
        (folder / "config.json").write_text(json.dumps(config))
    if form == "pipeline":
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler/scheduler_config.json").write_text(
            json.dumps({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000})
        )
    inspection = DIT.inspect(tmp_path, {})
    assert inspection.layout == "diffusers"
    assert inspection.latent == (4, 8, 8)
    assert inspection.labels == 6
    assert inspection.learned_variance
    assert (inspection.noise == NoiseScheduleSpec(kind="linear")) == (form == "pipeline")
    sample, timestep, labels = DIT.example(inspection, batch=3, seed=0)
    with torch.no_grad():
        want = model(sample, timestep=timestep, class_labels=labels).sample
        assert torch.equal(DIT.load(inspection)(sample, timestep, labels), want)


def test_diffusers_folders_of_other_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(BadCheckpoint, match="UNet2DConditionModel"):
        DIT.inspect(tmp_path, {})
    (tmp_path / "config.json").unlink()
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    with pytest.raises(BadCheckpoint, match="StableDiffusionPipeline with the parts unet"):
        DIT.inspect(tmp_path, {})
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"without config\.json"):
        DIT.inspect(tmp_path, {})
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(BadCheckpoint, match=r"has no diffusion_pytorch_model\.safetensors"):
        DIT.inspect(tmp_path, {})
    diffusers_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 4}))
    with pytest.raises(BadCheckpoint, match=r"does not fit its config\.json"):
        DIT.inspect(tmp_path, {})


LOOKALIKES = {
    "a LoRA": ["transformer_blocks.0.attn1.to_q.lora_A.weight", "transformer_blocks.0.attn1.to_q.lora_B.weight"],
    "a UNet": ["conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a VAE": ["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight", "quant_conv.weight"],
    "a whole Stable Diffusion checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.time_embed.0.weight",
        "first_stage_model.decoder.conv_in.weight",
    ],
    "a CLIP text encoder": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "the weights of a diffusers DiTTransformer2DModel": ["proj_out_1.weight", "transformer_blocks.0.norm1.linear.bias"],
    "a multimodal diffusion transformer": ["joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"],
    "a PixArt transformer": ["transformer_blocks.0.scale_shift_table", "caption_projection.linear_1.weight"],
    "something unknown": ["layer1.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(LOOKALIKES))
def test_other_checkpoints_are_called_what_they_are(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in LOOKALIKES[kind]}, path)
    with pytest.raises(BadCheckpoint, match=f"is no DiT: it looks like {kind}"):
        DIT.inspect(path, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), "lacks 1 tensors, e.g. blocks.1.attn.qkv.bias"),
        (lambda s: s.update({"blocks.0.mlp.fc2.bias": torch.zeros(7)}), r"of shape \[7\]; allowed is \[32\]"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 tensors that no DiT has, e.g. extra"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 15, 32)), r"\[1, 15, 32\]; allowed is \[1, n\*n, width\]"),
        (lambda s: s.update({"final_layer.linear.weight": torch.zeros(48, 32)}), "48 outputs; allowed are 16 .* or 32"),
        (lambda s: s.update({"blocks.0.attn.qkv.lora_A": torch.zeros(1)}), "an unmerged LoRA"),
    ],
)
def test_incomplete_dits_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    state = published_state()
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=words):
        DIT.inspect(tmp_path / "model.safetensors", {"num_heads": 4})


def test_heads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(published_state(), path)
    with pytest.raises(BadCheckpoint, match="6 at width 384") as caught:
        DIT.inspect(path, {})
    assert "num_heads" in caught.value.hint
    with pytest.raises(BadCheckpoint, match="5 attention heads do not divide the width 32"):
        DIT.inspect(path, {"num_heads": 5})
    with pytest.raises(BadInput, match="'four'"):
        DIT.inspect(path, {"num_heads": "four"})
    with pytest.raises(UnknownName, match="did you mean 'num_heads'"):
        DIT.inspect(path, {"numheads": 4})


def test_nan_weights_are_named(tmp_path: Path) -> None:
    state = published_state()
    state["blocks.1.mlp.fc1.weight"][3, 3] = math.nan
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"blocks\.1\.mlp\.fc1\.weight holds NaN"):
        DIT.load(DIT.inspect(tmp_path / "model.safetensors", {"num_heads": 4}))
