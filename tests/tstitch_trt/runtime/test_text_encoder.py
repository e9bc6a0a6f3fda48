"""Prompts through the text encoders' engines: as transformers encodes them, in chunks where they are long."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from support.compiled_parts import export_network, load_part
from support.tiny_families import clip_text_folder
from tstitch_engines.errors import BadBundle, NotFinite, OutOfProfile, Unavailable
from tstitch_engines.spec import Range
from tstitch_export.families import open_family
from tstitch_trt.runtime.text_encoder import PromptLength, TextEncoder, TextEncoders, TokenLayout, open_tokenizer

SHORT = "a photo of a cat, isn't it?"
EXACT = "cat " * 75
LONG = "a cinematic portrait of an astronaut! " * 30
OPTIONS = {"text_encoder": {"hidden_state": -2}, "text_encoder_2": {"hidden_state": -2}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Two encoders as SDXL has them, those of ``test_clip_text.py``; the second pads with "!". -> folder, modules,
    networks."""
    folder = tmp_path_factory.mktemp("text")
    models = {
        "text_encoder": clip_text_folder(folder / "pipe"),
        "text_encoder_2": clip_text_folder(
            folder / "pipe", "text_encoder_2", projection=24, act="gelu", width=48, pad="!", legacy=True
        ),
    }
    family = open_family("clip-text")
    networks = {}
    for name in models:
        found = family.inspect(folder / "pipe" / name, OPTIONS[name])
        networks[name] = export_network("clip-text", folder / "pipe" / name, folder / name, OPTIONS[name])
        family.assets(found, folder / name)
    return folder, models, networks


@pytest.fixture(scope="module")
def texts(pipeline: tuple[Path, dict[str, Any], dict[str, Any]]) -> TextEncoders:
    folder, _, networks = pipeline
    return TextEncoders(
        {
            name: TextEncoder(
                load_part(name, network, folder / name, {"B": Range(1, 2, 3)}), folder / name / "tokenizer.json"
            )
            for name, network in networks.items()
        }
    )


def theirs(folder: Path, models: dict[str, Any], name: str, rows: Any) -> tuple[Any, Any]:
    with torch.inference_mode():
        out = models[name](torch.as_tensor(rows), output_hidden_states=True)
    return out.hidden_states[-2].numpy(), out[0].numpy() if name.endswith("2") else None


def close(got: Any, want: Any) -> bool:
    return got.shape == want.shape and float(np.abs(got - want).max()) <= 1e-4 * float(np.abs(want).max())


def tokenizer_of(folder: Path, name: str) -> Any:
    return CLIPTokenizer.from_pretrained(folder / "pipe" / name.replace("text_encoder", "tokenizer"))


def test_as_the_pipelines_encode(pipeline: Any, texts: TextEncoders) -> None:
    """Five texts through engines of at most three: padded to 77 and encoded as diffusers does."""
    folder, models, _ = pipeline
    prompts = [SHORT, "", EXACT, "ugly, blurry!!", SHORT]
    found = texts.encode(["text_encoder", "text_encoder_2"], prompts)
    for name, (hidden, pooled) in found.items():
        ids = tokenizer_of(folder, name)(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        want, want_pooled = theirs(folder, models, name, ids)
        assert hidden.dtype == np.float32
        assert close(hidden, want)
        assert (pooled is None) == (want_pooled is None)
        assert pooled is None or close(pooled, want_pooled)


def test_long_texts_go_in_chunks(pipeline: Any, texts: TextEncoders) -> None:
    """Every token of the text is in some chunk; the short one gets chunks of the empty text."""
    folder, models, _ = pipeline
    found = texts.encode(["text_encoder", "text_encoder_2"], [LONG, SHORT])
    for name, (hidden, pooled) in found.items():
        tokenizer = tokenizer_of(folder, name)
        rows = []
        for text in (LONG, SHORT):
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            for start in range(0, hidden.shape[1] // 77 * 75, 75):
                part = [tokenizer.bos_token_id, *ids[start : start + 75], tokenizer.eos_token_id]
                rows.append(part + [tokenizer.pad_token_id] * (77 - len(part)))
            assert start + 75 >= len(ids)
        want, want_pooled = theirs(folder, models, name, rows)
        chunks = len(rows) // 2
        assert chunks > 2
        assert close(hidden, want.reshape(2, chunks * 77, -1))
        assert pooled is None or close(pooled, want_pooled[::chunks])


@pytest.mark.parametrize(("text", "chunks"), [("", 1), (EXACT, 1), (EXACT + "cat", 2), ("cat " * 226, 4)])
def test_a_text_has_its_length_and_what_fits(texts: TextEncoders, text: str, chunks: int) -> None:
    length = texts.length(text, 3 * 77)
    assert length == PromptLength(len(text.split()), chunk=75, most=225)
    assert length.chunks == chunks
    assert TextEncoders({}).length(text, 231) is None


def test_both_encoders_get_one_length(pipeline: Any, texts: TextEncoders) -> None:
    """Where "!" is the pad token it is cut out of a text first, and "'s" behind it is whole: lengths differ."""
    text = "!'s " * 30
    found = texts.encode(["text_encoder", "text_encoder_2"], [text])
    lengths = {name: len(encoder.tokens(text)) for name, encoder in texts._encoders.items()}
    assert lengths["text_encoder_2"] <= 75 < lengths["text_encoder"]
    assert {hidden.shape[1] for hidden, _ in found.values()} == {154}


def test_equal_chunks_are_encoded_once(pipeline: Any, texts: TextEncoders, monkeypatch: pytest.MonkeyPatch) -> None:
    part = texts._encoders["text_encoder"]._part
    seen = []
    run = part._run
    monkeypatch.setattr(part, "_run", lambda inputs, sizes: seen.append(len(inputs["input_ids"])) or run(inputs, sizes))
    hidden, _ = texts.encode(["text_encoder"], [SHORT, "", SHORT, ""])["text_encoder"]
    assert seen == [2]
    assert np.array_equal(hidden[0], hidden[2])
    assert not np.array_equal(hidden[0], hidden[1])


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_layout(count: int, chunks: int) -> None:
    layout = TokenLayout(tokens=77, bos=1000, eos=1001, pad=0)
    assert layout.chunks(count) == chunks
    rows = layout.lay_out(range(1, count + 1), chunks + 1)
    assert rows.shape == (chunks + 1, 77)
    assert (rows[:, 0] == 1000).all()
    assert (np.count_nonzero(rows == 1001, axis=1) == 1).all()
    assert [i for i in rows[rows < 1000] if i] == list(range(1, count + 1))
    assert rows[-1].tolist() == [1000, 1001, *[0] * 75]


def test_without_tokenizers(monkeypatch: pytest.MonkeyPatch, pipeline: Any) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Unavailable, match="reading prompts needs tokenizers") as caught:
        open_tokenizer(pipeline[0] / "text_encoder/tokenizer.json")
    assert 'pip install "tstitch-trt[prompt]"' in caught.value.hint


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadBundle, match=r"tokenizer\.json is no tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_or_with_other_tokens(texts: TextEncoders, tmp_path: Path) -> None:
    """The library gives up on a pattern with a panic, which is no ``Exception``; an id beyond the table of embeddings
    would be read from memory that is not the table's."""
    good = texts._encoders["text_encoder"]
    data = json.loads(good._path.read_bytes())
    ids = good.tokens("a fox")
    data["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": " "}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    hostile = TextEncoder(good._part, tmp_path / "tokenizer.json")
    with pytest.raises(BadBundle, match="can't read the text"):
        hostile.tokens("a" * 30)
    data["model"]["vocab"] = {token: 100_000 + number for token, number in data["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "normalizer": None, "post_processor": None}))
    with pytest.raises(BadBundle, match="and the text encoder knows"):
        TextEncoder(good._part, tmp_path / "tokenizer.json").tokens("a fox")
    assert ids == good.tokens("a fox")


@pytest.mark.parametrize("change", [{"tokens": 10**12}, {"tokens": 1}, {"bos": "x"}, {"pad": -1}, {"eos": None}])
def test_a_layout_that_can_not_be(change: dict[str, Any], texts: TextEncoders) -> None:
    network = texts._encoders["text_encoder"]._part.network
    altered = msgspec.structs.replace(network, config={**network.config, **change})
    with pytest.raises(BadBundle, match="the config of a text encoder has"):
        TokenLayout.of(altered)


def test_parts_check_sizes_and_outputs(pipeline: Any, texts: TextEncoders) -> None:
    part = texts._encoders["text_encoder"]._part
    with pytest.raises(OutOfProfile, match="text_encoder engine"):
        part.profile.check({"B": 4}, what="text_encoder engine")
    engine = part._engine
    inner = engine.enqueue

    def broken() -> None:
        inner()
        buffers = part._buffers({"B": 1})
        part.device.upload(buffers["hidden"], np.full(buffers["hidden"].shape, np.nan, np.float32))

    engine.enqueue = broken  # type: ignore[method-assign]
    try:
        with pytest.raises(NotFinite, match="text_encoder gave NaN or infinity in 'hidden'"):
            texts.encode(["text_encoder"], [SHORT])
    finally:
        del engine.enqueue  # type: ignore[method-assign]
