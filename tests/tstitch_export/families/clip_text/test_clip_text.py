"""Family ``clip-text``: the exported text encoders equal transformers' and diffusers' use of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from support.compare import relative_error
from support.exports import graph_of, network_plan, onnx_of
from support.tiny_families import clip_text_folder, clip_tokenizer_folder, clip_vocabulary
from tstitch_engines.errors import BadCheckpoint, BadInput, BuildFailed, UnknownName
from tstitch_export.families import open_family
from tstitch_export.families.base import Scalar
from tstitch_export.onnx_export.exporter import export_onnx

TEXT = open_family("clip-text")


def ignore(phase: str, share: float) -> None:
    return


def export(path: Path, folder: Path, options: Mapping[str, Scalar] | None = None, precision: Any = "fp32") -> Any:
    graph = graph_of(onnx_of(network_plan("clip-text", path, options, precision), folder), folder)
    return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


def ids(batch: int, *, pad: int | None = None) -> torch.Tensor:
    """Texts of several lengths, the longest full."""
    size = len(clip_vocabulary()[0])
    bos, eos = size - 2, size - 1
    rows = torch.full((batch, 77), eos if pad is None else pad)
    generator = torch.Generator().manual_seed(batch)
    for row, length in enumerate(np.linspace(75, 0, batch).astype(int)):
        rows[row, 1 : 1 + length] = torch.randint(0, bos, (length,), generator=generator)
        rows[row, 1 + length] = eos
    rows[:, 0] = bos
    return rows


def assert_close(got: Any, want: torch.Tensor, limit: float = 1e-4) -> None:
    assert relative_error(got, want.detach()) <= limit


@pytest.mark.parametrize("legacy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_stable_diffusion_1(tmp_path: Path, legacy: bool) -> None:
    model = clip_text_folder(tmp_path / "pipe", legacy=legacy)
    found = TEXT.inspect(tmp_path / "pipe/text_encoder", {})
    assert [spec.name for spec in TEXT.outputs(found, "fp32")] == ["hidden"]
    session = export(tmp_path / "pipe/text_encoder", tmp_path / "out")
    for batch in (1, 4):
        (hidden,) = session.run(None, {"input_ids": ids(batch).numpy()})
        assert_close(hidden, model(ids(batch))[0])


@pytest.mark.parametrize("legacy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sdxl(tmp_path: Path, legacy: bool) -> None:
    """Both encoders as the SDXL pipeline uses them: the state before the last, pooled from the second."""
    first = clip_text_folder(tmp_path / "pipe")
    second = clip_text_folder(
        tmp_path / "pipe", "text_encoder_2", projection=24, act="gelu", width=48, pad="!", legacy=legacy
    )
    index = {"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    found = TEXT.inspect(tmp_path / "pipe/text_encoder", {})
    assert (found.config["hidden_state"], found.config["final_norm"], found.config["projection"]) == (-2, False, 0)
    (hidden,) = export(tmp_path / "pipe/text_encoder", tmp_path / "one").run(None, {"input_ids": ids(3).numpy()})
    assert_close(hidden, first(ids(3), output_hidden_states=True).hidden_states[-2])

    found = TEXT.inspect(tmp_path / "pipe/text_encoder_2", {})
    assert (found.config["pad"], found.config["projection"]) == (0, 24)
    session = export(tmp_path / "pipe/text_encoder_2", tmp_path / "two")
    for batch in (1, 5):
        tokens = ids(batch, pad=0)
        hidden, pooled = session.run(["hidden", "pooled"], {"input_ids": tokens.numpy()})
        want = second(tokens, output_hidden_states=True)
        assert_close(hidden, want.hidden_states[-2])
        assert_close(pooled, want[0])
    both = TEXT.inspect(tmp_path / "pipe", {"part": "text_encoder_2"})
    assert both.config == found.config


def test_unused_layers_are_not_exported(tmp_path: Path) -> None:
    clip_text_folder(tmp_path / "pipe")
    found = TEXT.inspect(tmp_path / "pipe/text_encoder", {"hidden_state": -2})
    names = TEXT.load(found).state_dict()
    assert not [name for name in names if name.startswith(("encoder.layers.2", "final_layer_norm"))]


def test_clip_skip(tmp_path: Path) -> None:
    """``clip_skip=2`` of diffusers: an earlier state, with the final norm."""
    model = clip_text_folder(tmp_path / "pipe", layers=4)
    options = {"hidden_state": -3, "final_norm": True}
    (hidden,) = export(tmp_path / "pipe", tmp_path / "out", options).run(None, {"input_ids": ids(2).numpy()})
    state = model(ids(2), output_hidden_states=True).hidden_states[-3]
    assert_close(hidden, getattr(model, "text_model", model).final_layer_norm(state))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(tmp_path: Path, precision: str) -> None:
    model = clip_text_folder(tmp_path / "pipe", projection=16)
    if precision == "bf16":  # ONNX Runtime has no such kernels: the exporter's own check is the widened graph
        found = TEXT.inspect(tmp_path / "pipe", {})
        (tmp_path / "out").mkdir()
        check = export_onnx(TEXT, found, precision="bf16", folder=tmp_path / "out", progress=ignore)
        assert check.rel_l2 < 1e-2
        return
    hidden, pooled = export(tmp_path / "pipe", tmp_path / "out", {}, "fp16").run(None, {"input_ids": ids(3).numpy()})
    assert hidden.dtype == pooled.dtype == np.float16
    want = model(ids(3))
    # Three layers of products rounded to 11 bits
    assert_close(hidden.astype(np.float64), want.last_hidden_state, 3e-3)
    assert_close(pooled.astype(np.float64), want.text_embeds, 3e-3)


def test_pooled_ignores_what_follows_the_end(tmp_path: Path) -> None:
    clip_text_folder(tmp_path / "pipe", projection=16)
    found = TEXT.inspect(tmp_path / "pipe", {})
    model = TEXT.load(found)
    tokens = ids(3)
    other = tokens.clone()
    end = (tokens == int(found.config["eos"])).int().argmax(1)
    for row, place in enumerate(end):
        other[row, place + 1 :] = 7
    assert torch.equal(model(tokens)[1], model(other)[1])


def test_older_names_and_files(tmp_path: Path) -> None:
    """transformers 4 writes ``text_model.`` before every name, and its position ids."""
    model = clip_text_folder(tmp_path / "pipe")
    folder = tmp_path / "pipe/text_encoder"
    state = {f"text_model.{name.removeprefix('text_model.')}": t.clone() for name, t in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    found = TEXT.inspect(folder, {})
    assert_close(TEXT.load(found)(ids(2)).numpy(), model(ids(2))[0])


def open_clip_state(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """A transformers tower in OpenCLIP's names: one matrix for q, k and v, the projection transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    out = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.ones(()),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(model.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            source = f"encoder.layers.{layer}"
            target = f"transformer.resblocks.{layer}"
            for ours, theirs in names.items():
                out[f"{target}.{theirs}.{kind}"] = state[f"{source}.{ours}.{kind}"]
            parts = [state[f"{source}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            out[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
    return {prefix + name: tensor.contiguous().half() for name, tensor in out.items()}


def test_single_files(tmp_path: Path) -> None:
    """The original layouts: CLIP-L as transformers has it, bigG and ViT-H as OpenCLIP has them."""
    tokenizer = str(clip_tokenizer_folder(tmp_path / "tokenizer", pad="!"))
    big = clip_text_folder(tmp_path / "big", projection=24, act="gelu", width=128).half().float()
    small = clip_text_folder(tmp_path / "small", width=128).half().float()
    plain = {
        f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": tensor.half()
        for name, tensor in small.state_dict().items()
    }
    other = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    save_file({**plain, **open_clip_state(big, "conditioner.embedders.1.model."), **other}, tmp_path / "xl.safetensors")
    save_file({**open_clip_state(big, "cond_stage_model.model."), **other}, tmp_path / "sd2.safetensors")
    tokens = ids(3, pad=0)
    want = big(tokens, output_hidden_states=True)

    found = TEXT.inspect(tmp_path / "xl.safetensors", {"tokenizer": tokenizer, "part": "text_encoder_2"})
    hidden, pooled = TEXT.load(found)(tokens)
    assert_close(hidden.numpy(), want.hidden_states[-2])
    assert_close(pooled.numpy(), want[0])
    found = TEXT.inspect(tmp_path / "xl.safetensors", {"tokenizer": tokenizer})
    assert_close(TEXT.load(found)(tokens).numpy(), small(tokens, output_hidden_states=True).hidden_states[-2])
    found = TEXT.inspect(tmp_path / "sd2.safetensors", {"tokenizer": tokenizer})
    assert_close(TEXT.load(found)(tokens).numpy(), big.text_model.final_layer_norm(want.hidden_states[-2]))

    with pytest.raises(BadCheckpoint, match="holds no tokenizer") as caught:
        TEXT.inspect(tmp_path / "sd2.safetensors", {})
    assert "text_encoder.tokenizer=DIR" in caught.value.hint
    with pytest.raises(BadCheckpoint, match="has no text_encoder_2"):
        TEXT.inspect(tmp_path / "sd2.safetensors", {"tokenizer": tokenizer, "part": "text_encoder_2"})
    save_file(other, tmp_path / "unet.safetensors")
    with pytest.raises(BadCheckpoint, match="has no text encoder"):
        TEXT.inspect(tmp_path / "unet.safetensors", {"tokenizer": tokenizer})


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    clip_text_folder(tmp_path / "pipe")
    found = TEXT.inspect(tmp_path / "pipe", {})
    assets = TEXT.assets(found, tmp_path)
    encoded = Tokenizer.from_file(str(assets["tokenizer"])).encode("a cat")
    assert encoded.ids[0] == found.config["bos"]
    assert encoded.ids[-1] == found.config["eos"]
    assert {file.name for file in found.files} >= {"vocab.json", "merges.txt", "config.json", "model.safetensors"}
    assert found.files[-1].name == "model.safetensors"


def test_what_is_refused(tmp_path: Path) -> None:
    clip_text_folder(tmp_path / "pipe")
    folder = tmp_path / "pipe/text_encoder"
    with pytest.raises(BadInput, match=r"hidden_state is -4; allowed is -3 to -1"):
        TEXT.inspect(folder, {"hidden_state": -4})
    with pytest.raises(UnknownName, match="unknown option of family 'clip-text' 'hidden'"):
        TEXT.inspect(folder, {"hidden": -1})
    with pytest.raises(UnknownName, match="text_encoder_3"):
        TEXT.inspect(folder, {"part": "text_encoder_3"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(BadCheckpoint, match=r"mlp\.fc1\.weight is \[64, 32\]; wanted is \[96, 32\]"):
        TEXT.load(TEXT.inspect(folder, {}))
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(BadCheckpoint, match="hidden_act is 'relu'"):
        TEXT.inspect(folder, {})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(BadCheckpoint, match="has 687 tokens, the text encoder text_encoder 100"):
        TEXT.inspect(folder, {})
    (folder / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"]}))
    with pytest.raises(BadCheckpoint, match="looks like a T5EncoderModel"):
        TEXT.inspect(folder, {})
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "pipe/tokenizer").rename(tmp_path / "pipe/elsewhere")
    with pytest.raises(BadCheckpoint, match="has no tokenizer"):
        TEXT.inspect(folder, {})
    assert TEXT.inspect(folder, {"tokenizer": str(tmp_path / "pipe/elsewhere")}).config["bos"]


def test_not_finite_weights_are_named(tmp_path: Path) -> None:
    model = clip_text_folder(tmp_path / "pipe")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(name for name in state if name.endswith("layers.1.mlp.fc1.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, tmp_path / "pipe/text_encoder/model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.mlp\.fc1\.weight holds NaN"):
        TEXT.load(TEXT.inspect(tmp_path / "pipe", {}))


def test_float16_overflow_is_found(tmp_path: Path) -> None:
    model = clip_text_folder(tmp_path / "pipe")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if "mlp.fc2.weight" in name:
            state[name] *= 1e6
    save_file(state, tmp_path / "pipe/text_encoder/model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildFailed, match="NaN or infinity in fp16"):
        export_onnx(
            TEXT, TEXT.inspect(tmp_path / "pipe", {}), precision="fp16", folder=tmp_path / "out", progress=ignore
        )


def loaded(folder: Path) -> Any:
    return TEXT.load(TEXT.inspect(folder, {}))


def configured(pipe: Path, **changes: Any) -> Path:
    file = pipe / "text_encoder/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return pipe / "text_encoder"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_padding_that_nobody_attends_to(tmp_path: Path, pad: str) -> None:
    """``use_attention_mask``: Stable Diffusion's pipelines give the tokenizer's mask to the text encoder."""
    from transformers import CLIPTokenizer

    model = clip_text_folder(tmp_path / "pipe", pad=pad)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "pipe/tokenizer")
    given = tokenizer(
        ["", "a photo of a cat", "cat! !", "cat " * 90],
        padding="max_length", max_length=77, truncation=True, return_tensors="pt",
    )  # fmt: skip
    with torch.inference_mode():
        want, unmasked = model(**given)[0], model(given.input_ids)[0]
        got = loaded(configured(tmp_path / "pipe", use_attention_mask=True))(given.input_ids)
        assert_close(got, want)
        assert relative_error(unmasked, want) > 0.01
        assert_close(loaded(configured(tmp_path / "pipe", use_attention_mask=False))(given.input_ids), unmasked)
        index = {"_class_name": "StableDiffusionXLPipeline"}  # its pipelines do not read the setting
        (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
        found = TEXT.inspect(configured(tmp_path / "pipe", use_attention_mask=True), {})
    assert "masked" not in found.config


@pytest.mark.slow
def test_a_masked_encoder_is_exported(tmp_path: Path) -> None:
    model = clip_text_folder(tmp_path / "pipe")
    session = export(configured(tmp_path / "pipe", use_attention_mask=True), tmp_path / "out")
    for batch in (1, 4):
        given = ids(batch)
        mask = (given != given[0, -1]).flip(1).cumsum(1).flip(1) > 0
        mask = torch.cat([torch.ones(batch, 1, dtype=torch.bool), mask[:, :-1]], dim=1)  # and the end itself
        (hidden,) = session.run(None, {"input_ids": given.numpy()})
        assert_close(hidden, model(given, attention_mask=mask.long())[0])


def test_a_text_without_its_end(tmp_path: Path) -> None:
    """transformers then pools the first token."""
    model = clip_text_folder(tmp_path / "pipe", projection=24)
    model.text_model.eos_token_id = 1  # none of the ids
    rows = ids(3).clamp(min=2)
    with torch.inference_mode():
        assert_close(loaded(configured(tmp_path / "pipe", eos_token_id=1))(rows)[1], model(rows).text_embeds)


@pytest.mark.parametrize(
    "changes",
    [{"layer_norm_eps": 0.1}, {"num_attention_heads": 4}, {"num_hidden_layers": 2}, {"hidden_act": "gelu"},
     {"attention_dropout": 0.5, "bos_token_id": 3, "pad_token_id": 3, "initializer_factor": 3.0, "is_decoder": True}],
)  # fmt: skip
def test_every_key_of_a_config_is_as_transformers_takes_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import CLIPTextModel

    clip_text_folder(tmp_path / "pipe")
    folder = configured(tmp_path / "pipe", **changes)
    model = CLIPTextModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert_close(loaded(folder)(ids(3)), model(ids(3))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; known are quick_gelu, gelu"),
        ({"hidden_act": None}, "hidden_act is null"),
        ({"projection_dim": 8}, r"projection_dim is 8, and the weights have text_projection of \[24, 32\]"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"layer_norm_eps": None}, "layer_norm_eps is null"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3, which does not divide hidden_size 32"),
        ({"quantization_config": {"load_in_8bit": True}}, "has quantization_config, which can't be honoured"),
        ({"text_config": {"hidden_size": 8}}, "has text_config, which can't be honoured"),
        ({"max_position_embeddings": 64}, r"pads texts to 77 tokens \(model_max_length\), and the text encoder"),
    ],
)
def test_keys_of_a_config_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    clip_text_folder(tmp_path / "pipe", projection=24)
    with pytest.raises(BadCheckpoint, match=message):
        TEXT.inspect(configured(tmp_path / "pipe", **changes), {})
