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


def test_added_tokens_are_kept(tmp_path: Path) -> None:
    """Textual inversion adds tokens behind the vocabulary."""
    folder = clip_tokenizer_folder(tmp_path / "tokenizer")
    size = len(clip_vocabulary()[0])
    (folder / "added_tokens.json").write_text(json.dumps({"<my-cat>": size, "<my-dog>": size + 1}))
    own = ours(folder, tmp_path / "tokenizer.json")
    assert own.encode("a <my-dog> photo", add_special_tokens=False).ids[1] == size + 1
    assert read_tokenizer(folder).size == size + 2


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
