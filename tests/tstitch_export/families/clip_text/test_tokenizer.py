"""CLIP's tokenizer as one file: the same tokens as transformers' CLIPTokenizer, from every way it is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from support.tiny_families import clip_tokenizer_folder, clip_vocabulary
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.families.clip_text.tokenizer import read_tokenizer

TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "A  PHOTO\tof\n\na   Cat ",
    "it's, they've, we'll, i'm, she'd, you're, can't; 'tis 'S 'RE",
    "hello!!! (really?) [x:1.2] {a|b} <lora:x:0.8> a_b-c/d\\e #tag @you 100% ~ ^ ` \" '",
    "1984 2001 3.14159 ½ ² ٣ Ⅷ",
    "naïve café Ångström cafe\u0301 ﬁ ＡＢＣ İstanbul ẞ ΣΊΣΥΦΟΣ",
    "красивый кот 猫が好き 고양이 قطة חתול แมว नमस्ते",
    "🐱👨‍👩‍👧‍👦🏳️‍🌈 e\u0301\u0327 \u200bzero\u200dwidth\ufeff \u00a0nbsp\u3000wide",
    "<|startoftext|> inside <|endoftext|> and <|ENDOFTEXT|> !",
    "\x00\x07 control \x7f \ud7ff",
    "word " * 200,
    "antidisestablishmentarianism" * 5,
]


def ours(folder: Path, target: Path) -> Tokenizer:
    read_tokenizer(folder).write(target)
    return Tokenizer.from_file(str(target))


def theirs(folder: Path) -> Any:
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Padding with the end (SD 1.x, CLIP-L) and with "!" (SD 2.x, bigG), which then counts in a text too."""
    folder = clip_tokenizer_folder(tmp_path_factory.mktemp("pipeline") / "tokenizer", pad=request.param)
    return ours(folder, folder.parent / "tokenizer.json"), theirs(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_same_tokens_as_transformers(pair: tuple[Tokenizer, Any], text: str) -> None:
    own, other = pair
    assert own.encode(text).ids == other(text).input_ids
    assert own.encode(text, add_special_tokens=False).ids == other(text, add_special_tokens=False).input_ids


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_same_tokens_for_any_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    own, other = pair
    assert own.encode(text).ids == other(text).input_ids


def test_the_vocabulary_of_the_tests_is_laid_out_as_clips(tmp_path: Path) -> None:
    read = read_tokenizer(clip_tokenizer_folder(tmp_path / "tokenizer", pad="!"))
    vocabulary, merges = clip_vocabulary()
    assert (read.bos, read.eos, read.pad) == (len(vocabulary) - 2, len(vocabulary) - 1, 0)
    assert len(merges) > 150
    long = [token for token in vocabulary if len(token) > 6]
    assert len(long) > 20, "whole words are merged"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_what_transformers_5_saves(tmp_path: Path, pad: str) -> None:
    """It writes tokenizer.json and tokenizer_config.json only."""
    other = theirs(clip_tokenizer_folder(tmp_path / "tokenizer", pad=pad))
    other.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/vocab.json").exists()
    own = ours(tmp_path / "saved", tmp_path / "tokenizer.json")
    assert read_tokenizer(tmp_path / "saved").pad == other.pad_token_id
    assert [own.encode(text).ids for text in TEXTS] == [other(text, verbose=False).input_ids for text in TEXTS]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_what_transformers_4_saves(tmp_path: Path, pad: str) -> None:
    """Special tokens as strings, and a list that says how each is looked for."""
    folder = clip_tokenizer_folder(tmp_path / "tokenizer", pad=pad)
    size = len(clip_vocabulary()[0])
    listed = {
        size - 2: "<|startoftext|>",
        size - 1: "<|endoftext|>",
        size: "<my-cat>",
        **({0: "!"} if pad == "!" else {}),
    }
    record = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "added_tokens_decoder": {
            str(number): {**record, "content": token, "normalized": token.startswith("<|")}
            for number, token in listed.items()
        },
        **dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>"),
        "bos_token": "<|startoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    own, other = ours(folder, tmp_path / "tokenizer.json"), theirs(folder)
    texts = [*TEXTS, "a <my-cat> and a <MY-CAT>"]
    assert [own.encode(text).ids for text in texts] == [other(text, verbose=False).input_ids for text in texts]


CAT = {"content": "<my-cat>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
BEGIN = {**CAT, "content": "<|startoftext|>", "special": True, "normalized": True}
END = {**CAT, "content": "<|endoftext|>", "special": True}
CATS = ["a <my-cat> photo", "A <MY-CAT>", "<my-cat>s, a<my-cat>b", "wow! <My-Cat> !", "<|endoftext|> <|EndOfText|>"]


def listed(**cat: Any) -> dict[str, Any]:
    """The list of added tokens that transformers 4 writes into tokenizer_config.json."""
    size = len(clip_vocabulary()[0])
    return {"added_tokens_decoder": {str(size - 2): BEGIN, str(size - 1): END, str(size): {**CAT, **cat}}}


def stored(folder: Path, settings: dict[str, Any], **others: Any) -> Path:
    """A tokenizer's folder with these settings in tokenizer_config.json; ``others``: what is in files beside it."""
    clip_tokenizer_folder(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | settings
    for name, content in {**others, "tokenizer_config": config}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        *[(listed(**{flag: True}), {}) for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")],
        ({}, {"added_tokens": {"<my-cat>": None}}),
        ({}, {"added_tokens": {"<My-Cat>": None}}),
        ({"additional_special_tokens": ["<my-cat>"]}, {"added_tokens": {"<my-cat>": None}}),
        ({"additional_special_tokens": ["!"]}, {}),
        ({"mask_token": "!"}, {}),
        ({"unk_token": "!"}, {}),
        ({"bos_token": "!"}, {}),
        # Stable Diffusion 2: the two files differ, and the older one goes first where there is no list
        ({"pad_token": "<|endoftext|>"}, {"special_tokens_map": {"pad_token": "!"}}),
        ({"pad_token": "<|endoftext|>", **listed()}, {"special_tokens_map": {"pad_token": "!"}}),
        ({}, {"special_tokens_map": {"eos_token": END, "bos_token": BEGIN, "pad_token": {**END, "normalized": True}}}),
        ({"do_lower_case": False, "add_prefix_space": True, "errors": "strict", "strip_accents": True}, {}),
        ({"model_max_length": 10**30, "truncation_side": "left", "clean_up_tokenization_spaces": True}, {}),
    ],
)  # fmt: skip
def test_every_setting_is_as_transformers_takes_it(
    tmp_path: Path, settings: dict[str, Any], others: dict[str, Any]
) -> None:
    size = len(clip_vocabulary()[0])
    if "added_tokens" in others:
        others = {**others, "added_tokens": dict.fromkeys(others["added_tokens"], size)}
    folder = stored(tmp_path / "tokenizer", settings, **others)
    own, other = ours(folder, tmp_path / "tokenizer.json"), theirs(folder)
    assert [own.encode(text).ids for text in [*TEXTS, *CATS]] == [
        other(text, verbose=False).input_ids for text in [*TEXTS, *CATS]
    ]
    read = read_tokenizer(folder)
    assert (read.bos, read.eos, read.pad) == (other.bos_token_id, other.eos_token_id, other.pad_token_id)
    assert read.size <= len(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_side": "left"}, "padding_side is 'left'; allowed is 'right'"),
        ({"split_special_tokens": True}, "split_special_tokens is True; allowed is False"),
        ({"mask_token": "<mask>"}, "the special token '<mask>' is not in the vocabulary"),
        ({"additional_special_tokens": ["<x>"]}, "the special token '<x>' is not in the vocabulary"),
    ],
)
def test_settings_that_would_make_other_tokens(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadCheckpoint, match=message):
        read_tokenizer(stored(tmp_path / "tokenizer", settings))


def test_two_tokenizers_in_one_folder(tmp_path: Path) -> None:
    """transformers 5 reads tokenizer.json, older ones vocab.json: equal ones are one, others are refused."""
    folder = clip_tokenizer_folder(tmp_path / "tokenizer")
    theirs(folder).save_pretrained(tmp_path / "saved")
    whole = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    assert read_tokenizer(folder).size == len(clip_vocabulary()[0])
    added = {**whole, "added_tokens": [*whole["added_tokens"], {"id": len(clip_vocabulary()[0]), **CAT}]}
    (folder / "tokenizer.json").write_text(json.dumps(added))
    with pytest.raises(BadCheckpoint, match=r"'<my-cat>' is \d+ in tokenizer.json and None in vocab.json"):
        read_tokenizer(folder)
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({**whole, "padding": {"direction": "Left"}}))
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json pads on the left"):
        read_tokenizer(folder)


def test_damaged_and_foreign_folders(tmp_path: Path) -> None:
    folder = clip_tokenizer_folder(tmp_path / "tokenizer")
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    (folder / "merges.txt").write_text(merges.replace("\n", "\nabc\n", 1), encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"line 2 is 'abc'"):
        read_tokenizer(folder)
    (folder / "merges.txt").write_text(merges + "zzz yyy\n", encoding="utf-8")
    with pytest.raises(BadCheckpoint, match="don't fit the vocabulary"):
        read_tokenizer(folder).write(tmp_path / "out.json")
    (folder / "merges.txt").unlink()
    with pytest.raises(BadCheckpoint, match=r"no merges\.txt"):
        read_tokenizer(folder)
    (folder / "vocab.json").write_text('{"a": 0, "b": 0}')
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(BadCheckpoint, match="id of its own"):
        read_tokenizer(folder)
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(BadCheckpoint, match=r"'<\|startoftext\|>' is not in the vocabulary"):
        read_tokenizer(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match=r"neither vocab\.json nor tokenizer\.json"):
        read_tokenizer(tmp_path / "empty")
    (tmp_path / "empty/tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(BadCheckpoint, match="of the kind Unigram"):
        read_tokenizer(tmp_path / "empty")
