"""Textual inversions in files of their own, against diffusers' ``load_textual_inversion`` of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from support.diffusers_pipelines import sd_pipeline
from support.tiny_families import clip_text_folder
from tstitch_engines.errors import BadCheckpoint, BadInput
from tstitch_export.families import open_family

TEXT = open_family("clip-text")
WIDTH = 32


def made(folder: Path, value: str, part: str = "text_encoder") -> tuple[Any, Tokenizer]:
    """Our module and tokenizer of a text encoder with the option."""
    found = TEXT.inspect(folder / part, {"textual_inversion": value})
    return TEXT.load(found), Tokenizer.from_file(str(TEXT.assets(found, folder)["tokenizer"]))


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_as_diffusers_loads_them(tmp_path: Path) -> None:
    """Its own file with three vectors, one of AUTOMATIC1111 with two, and one of a single vector under another name."""
    files = [tmp_path / name for name in ("learned_embeds.bin", "style.pt", "one.safetensors")]
    torch.save({"<Cat>": vectors(3)}, files[0])
    torch.save({"string_to_param": {"*": vectors(2, seed=1)}, "name": "mystyle", "step": 7}, files[1])
    save_file({"<dog>": vectors(1, seed=2)[0]}, files[2])
    pipe = sd_pipeline(tmp_path / "pipe")
    own, tokenizer = made(tmp_path / "pipe", f"{files[0]}, {files[1]},<one>={files[2]}")
    for file, token in zip(files, (None, None, "<one>"), strict=True):
        pipe.load_textual_inversion(str(file), token=token)
    text = pipe.maybe_convert_prompt("a <Cat> and a <cat> in mystyle, <one> <dog>", pipe.tokenizer)
    given = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert tokenizer.encode(text).ids == given[0, : len(tokenizer.encode(text).ids)].tolist()
    assert given.max() == len(pipe.tokenizer) - 1
    with torch.inference_mode():
        torch.testing.assert_close(own(given), pipe.text_encoder(given)[0], rtol=1e-4, atol=1e-4)


def test_the_first_textual_inversions_hold_parameters(tmp_path: Path) -> None:
    """github.com/rinongal/textual_inversion saves a ``ParameterDict``."""
    clip_text_folder(tmp_path)
    parameters = torch.nn.ParameterDict()
    parameters["*"] = torch.nn.Parameter(vectors(2))
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}
    torch.save(content, tmp_path / "embeddings.pt")
    own, tokenizer = made(tmp_path, f"<cat>={tmp_path / 'embeddings.pt'}")
    rows = [tokenizer.token_to_id(token) for token in ("<cat>", "<cat>_1")]
    assert torch.equal(own.embeddings.token_embedding.weight[rows], vectors(2))
    with torch.inference_mode():
        assert own(torch.tensor([[0, *rows, *[1] * 74]])).isfinite().all()


def test_one_file_for_both_encoders_of_sdxl(tmp_path: Path) -> None:
    """``clip_l`` and ``clip_g``; the file has no name for its token. The others' rows stay as they are."""
    for part, width in (("text_encoder", WIDTH), ("text_encoder_2", 48)):
        clip_text_folder(tmp_path, part, width=width)
    file = tmp_path / "style.safetensors"
    save_file({"clip_l": vectors(2), "clip_g": vectors(2, 48)}, file)
    for part, width in (("text_encoder", WIDTH), ("text_encoder_2", 48)):
        plain = TEXT.load(TEXT.inspect(tmp_path / part, {})).embeddings.token_embedding.weight
        own, tokenizer = made(tmp_path, str(file), part)
        table = own.embeddings.token_embedding.weight
        assert torch.equal(table[: len(plain)], plain)
        assert torch.equal(table[len(plain) :], vectors(2, width))
        assert tokenizer.encode("style style_1", add_special_tokens=False).ids == [len(plain), len(plain) + 1]


def test_what_a_bundle_says_of_them(tmp_path: Path) -> None:
    clip_text_folder(tmp_path)
    file = tmp_path / "emb.safetensors"
    save_file({"emb_params": vectors(2)}, file)
    plain = TEXT.inspect(tmp_path / "text_encoder", {})
    found = TEXT.inspect(tmp_path / "text_encoder", {"textual_inversion": f"<x>={file}"})
    assert found.config["textual_inversion"] == "emb.safetensors:<x>"
    assert found.config["vocabulary"] == int(plain.config["vocabulary"]) + 2
    assert set(found.files) == {*plain.files, file}
    assert found.files[-1] == plain.files[-1]
    weights = {name: tuple(tensor.shape) for name, tensor in TEXT.load(found).named_parameters()}
    assert TEXT.lora_target(found).shapes.items() >= weights.items(), "as the weights are mapped for a later LoRA"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.bin", "'no.bin' is no file"),
        ("<a>=no.bin", "'no.bin' is no file"),
        ("wide.bin", r"wide.bin has <w> of shape \[2, 40\]; the text_encoder takes vectors of 32"),
        ("cube.bin", r"cube.bin has <w> of shape \[1, 2, 32\]"),
        ("second.bin", "no textual inversion for a text_encoder: its tensors are clip_g"),
        ("two.bin", "no textual inversion for a text_encoder: its tensors are a, b"),
        ("good.bin,good.bin", "the token '<good>' of good.bin is in the tokenizer already"),
        ("cat</w>=good.bin", "the token 'cat</w>' of good.bin is in the tokenizer already"),
        ("broken.bin", "broken.bin is damaged"),
        ("\x07=good.bin", "the token of good.bin is"),
    ],
)
def test_what_is_refused(tmp_path: Path, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clip_text_folder(tmp_path)
    for name, tensors in {
        "wide": {"<w>": vectors(2, 40)}, "cube": {"<w>": vectors(2)[None]}, "second": {"clip_g": vectors(2)},
        "two": {"a": vectors(1), "b": vectors(1)}, "good": {"<good>": vectors(1)},
    }.items():  # fmt: skip
        torch.save(tensors, f"{name}.bin")
    Path("broken.bin").write_bytes(b"PK" + bytes(64))
    with pytest.raises(BadInput, match=message) as caught:
        TEXT.inspect(tmp_path / "text_encoder", {"textual_inversion": value})
    assert type(caught.value) is BadInput, "a text encoder that is a bad checkpoint is left out of single files"


@pytest.mark.parametrize(
    "content",
    [
        {"<cat>": vectors(2)},
        {"string_to_param": {"*": vectors(2)}, "name": "x"},
        {"clip_l": vectors(1), "clip_g": vectors(1)},
    ],
    ids=["diffusers", "automatic1111", "sdxl"],
)
def test_in_the_place_of_a_model_it_is_named(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "learned_embeds.bin")
    for family in ("clip-text", "unet-sd"):
        with pytest.raises(BadCheckpoint, match="it looks like a textual inversion"):
            open_family(family).inspect(tmp_path / "learned_embeds.bin", {})
