"""Tiny checkpoints of every family with random weights, written as their libraries write them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["clip_text_folder", "clip_tokenizer_folder", "clip_vocabulary"]

_WORDS = """a photo of an astronaut riding a horse on mars, oil painting; detailed. the cat's whiskers aren't blue
they've seen 1984 and 2001! we'll go, i'm there, she'd stay. красивый кот 猫が好き naïve café coöperate über straße
don't can't won't it's that's lighting cinematic portrait studio trending illustration masterpiece ugly blurry"""


def randomise(model: Any, seed: int, scale: float = 0.05) -> Any:
    """Adds noise to every parameter: zeros and ones at the start would hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


# --- text encoders


@cache
def clip_vocabulary() -> tuple[Mapping[str, int], tuple[tuple[str, str], ...]]:
    """Vocabulary and merges in CLIP's order: bytes, bytes that end a word, merges by rank, begin and end.

    The bytes' order is CLIP's own as well, so that "!" is 0 as in the published vocabulary.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False)
    words = _WORDS.split()
    shuffled = random.Random(0)  # noqa: S311 - any order will do
    tokenizer.train_from_iterator([" ".join(shuffled.choices(words, k=12)) for _ in range(200)], trainer)
    merges = tuple((left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"])
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    return {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, merges


def clip_tokenizer_folder(folder: Path, *, pad: str = "<|endoftext|>") -> Path:
    """A tokenizer folder as Stable Diffusion pipelines have it."""
    vocabulary, merges = clip_vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    end = {"__type": "AddedToken", "content": "<|endoftext|>", "normalized": True, "lstrip": False, "rstrip": False}
    settings = {"bos_token": {**end, "content": "<|startoftext|>"}, "eos_token": end, "unk_token": end}
    more = {"pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
    return folder


def clip_text_folder(
    pipeline: Path,
    part: str = "text_encoder",
    *,
    projection: int = 0,
    act: str = "quick_gelu",
    layers: int = 3,
    width: int = 32,
    legacy: bool = False,
    pad: str = "<|endoftext|>",
) -> Any:
    """Writes ``part`` and its tokenizer into ``pipeline``; returns the transformers module (float32).

    ``legacy``: eos_token_id 2, as in checkpoints from before transformers 4.31.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    vocabulary, _ = clip_vocabulary()
    bos, eos = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=projection or 16,
        hidden_act=act,
        bos_token_id=0 if legacy else bos,
        eos_token_id=2 if legacy else eos,
    )
    model = randomise((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed=len(part))
    logging.disable_progress_bar()
    model.save_pretrained(pipeline / part)
    clip_tokenizer_folder(pipeline / part.replace("text_encoder", "tokenizer"), pad=pad)
    return model
