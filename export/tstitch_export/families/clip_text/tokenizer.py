"""CLIP's tokenizer as one ``tokenizer.json`` for the ``tokenizers`` library, made from a pipeline's tokenizer folder.

The rules are those of CLIP (arXiv 2103.00020; github.com/openai/CLIP, simple_tokenizer.py) as transformers'
CLIPTokenizer has them: NFC, runs of white space to one blank, lower case; a split into contractions, words, single
digits and runs of the rest; bytes as printable characters; byte pairs merged by rank, a word's last with ``</w>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.read import VOCABULARY_BYTES, read_text
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.needs import require
from tstitch_export.checkpoint.folder import read_json

__all__ = ["ClipTokenizer", "read_tokenizer"]

_PATTERN: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DEFAULTS: Final = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
_END: Final = "</w>"
_MOST_TOKENS: Final = 10_000_000


@dataclass(frozen=True)
class ClipTokenizer:
    """``special``: begin, end, pad and added tokens (textual inversion), with their ids.

    ``normalised``: those of them that match the lower-case text.
    """

    folder: Path
    files: tuple[Path, ...]
    vocabulary: Mapping[str, int] = field(repr=False)
    merges: Sequence[tuple[str, str]] = field(repr=False)
    special: Mapping[str, int]
    normalised: frozenset[str]
    begin: str
    end: str
    bos: int
    eos: int
    pad: int

    @property
    def size(self) -> int:
        return max(max(self.vocabulary.values()), *self.special.values()) + 1

    def write(self, path: Path) -> None:
        """Writes ``tokenizer.json``. Encoding with special tokens puts begin and end around the text; no padding."""
        tokenizers = require("tokenizers", "a bundle with a text encoder")
        normalizers, pre, processors = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.processors
        try:
            model = tokenizers.models.BPE(
                vocab=dict(self.vocabulary),
                merges=list(self.merges),
                continuing_subword_prefix="",
                end_of_word_suffix=_END,
                fuse_unk=False,
                unk_token=self.end,
            )
        except Exception as error:  # the library's own errors have no type of their own
            raise BadCheckpoint(
                f"{self.folder}: the merges don't fit the vocabulary: {error}",
                hint="copy vocab.json and merges.txt from the same tokenizer",
            ) from None
        made = tokenizers.Tokenizer(model)
        made.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        made.pre_tokenizer = pre.Sequence(
            [
                pre.Split(tokenizers.Regex(_PATTERN), behavior="removed", invert=True),
                pre.ByteLevel(add_prefix_space=False),
            ]
        )
        # A pad token found in a text counts as one too, as in transformers: SD 2.x pads with "!", and an exclamation
        # mark in a prompt then is that token and not the end of a word.
        made.add_special_tokens(
            [
                tokenizers.AddedToken(token, special=True, normalized=token in self.normalised)
                for token in sorted(self.special, key=self.special.__getitem__)
            ]
        )
        for token, number in self.special.items():
            if made.token_to_id(token) != number:
                raise BadCheckpoint(
                    f"{self.folder}: the added token {token!r} has the id {number}; the next free one is "
                    f"{made.token_to_id(token)}",
                    hint="save the tokenizer again with tokenizer.save_pretrained(DIR)",
                )
        made.post_processor = processors.TemplateProcessing(
            single=f"{self.begin} $A {self.end}", special_tokens=[(self.begin, self.bos), (self.end, self.eos)]
        )
        made.save(str(path))


def read_tokenizer(folder: Path) -> ClipTokenizer:
    """A folder with ``vocab.json`` and ``merges.txt``, or with ``tokenizer.json`` alone. Raises ``BadCheckpoint``."""
    whole, split = folder / "tokenizer.json", (folder / "vocab.json").is_file()
    vocabulary, merges, added = _read_parts(folder) if split else _read_whole(whole)
    settings = read_json(folder / "tokenizer_config.json") or {}
    stated = {**(read_json(folder / "special_tokens_map.json") or {}), **settings}
    listed = _listed(settings.get("added_tokens_decoder"), folder)
    added = {**added, **listed}
    begin, end = (_content(stated.get(key)) or default for key, default in _DEFAULTS.items())
    pad = _content(stated.get("pad_token")) or end
    known = {**{token: entry.number for token, entry in added.items()}, **vocabulary}
    for token in (begin, end, pad):
        if token not in known:
            raise BadCheckpoint(
                f"{folder}: the special token {token!r} is not in the vocabulary of {len(vocabulary)} tokens",
                hint="copy vocab.json, merges.txt and tokenizer_config.json from the same tokenizer",
            )
    # As transformers settles it: the list of added tokens decides, else the last of the tokens named one by one.
    named = {token: flag for key in _SPECIAL for token, flag in _flag(stated.get(key))}
    named |= {token: entry.normalised for token, entry in added.items()}
    names = ("vocab.json", "merges.txt", "added_tokens.json") if split else (whole.name,)
    files = (*names, "special_tokens_map.json", "tokenizer_config.json")
    return ClipTokenizer(
        folder=folder,
        files=tuple(folder / name for name in files if (folder / name).is_file()),
        vocabulary=vocabulary,
        merges=merges,
        special={token: known[token] for token in (*added, begin, end, pad)},
        normalised=frozenset(token for token, flag in named.items() if flag),
        begin=begin,
        end=end,
        bos=known[begin],
        eos=known[end],
        pad=known[pad],
    )


class _Added(NamedTuple):
    number: int
    normalised: bool


_Parts = tuple[dict[str, int], list[tuple[str, str]], dict[str, _Added]]


def _read_parts(folder: Path) -> _Parts:
    vocabulary = _numbered(read_json(folder / "vocab.json", VOCABULARY_BYTES) or {}, folder / "vocab.json")
    added = _numbered(read_json(folder / "added_tokens.json") or {}, folder / "added_tokens.json")
    file = folder / "merges.txt"
    if not file.is_file():
        raise BadCheckpoint(f"{folder} has vocab.json and no merges.txt", hint="copy merges.txt too")
    try:
        lines = read_text(file, VOCABULARY_BYTES).split("\n")
    except (OSError, DecodeError) as error:
        raise BadCheckpoint(f"{file} is damaged: {error}", hint="download or copy it again") from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines):
        if not line.strip() or (number == 0 and line.startswith("#version")):
            continue
        left, blank, right = line.strip().partition(" ")
        if not blank or " " in right:
            raise BadCheckpoint(
                f"{file}: line {number + 1} is {line[:40]!r}; wanted are two tokens and a blank between them",
                hint="download or copy it again",
            )
        merges.append((left, right))
    return vocabulary, merges, {token: _Added(number, False) for token, number in added.items()}


def _read_whole(file: Path) -> _Parts:
    data = read_json(file, VOCABULARY_BYTES)
    if data is None:
        raise BadCheckpoint(
            f"{file.parent} is no CLIP tokenizer: it has neither vocab.json nor tokenizer.json",
            hint="give the tokenizer folder of the pipeline that the text encoder is from",
        )
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != _END:
        raise BadCheckpoint(
            f"{file} is a tokenizer of the kind {model.get('type')} with the word ending "
            f"{model.get('end_of_word_suffix')!r}; CLIP's is BPE with {_END!r}",
            hint="give the tokenizer folder of the pipeline that the text encoder is from",
        )
    try:
        pairs = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
        listed = {str(entry["id"]): entry for entry in data.get("added_tokens") or ()}
    except (KeyError, TypeError) as error:
        raise BadCheckpoint(f"{file} is damaged: {error!r}", hint="download or copy it again") from None
    if any(len(pair) != 2 for pair in pairs):
        raise BadCheckpoint(f"{file} is damaged: a merge is no pair", hint="download or copy it again")
    vocabulary = _numbered(model.get("vocab") or {}, file)
    merges = [(str(left), str(right)) for left, right in pairs]
    return vocabulary, merges, _listed(listed, file)


def _listed(entries: object, file: Path) -> dict[str, _Added]:
    """Added tokens by id, as ``tokenizer_config.json`` lists them."""
    try:
        return {
            str(entry["content"]): _Added(int(number), bool(entry.get("normalized", False)))
            for number, entry in dict(entries or {}).items()  # type: ignore[call-overload]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{file} is damaged: {error!r}", hint="download or copy it again") from None


def _numbered(tokens: Mapping[str, Any], file: Path) -> dict[str, int]:
    numbers = list(tokens.values())
    if any(type(n) is not int or not 0 <= n <= _MOST_TOKENS for n in numbers) or len(set(numbers)) != len(numbers):
        raise BadCheckpoint(f"{file} gives a token no id of its own", hint="download or copy it again")
    return dict(tokens)


def _flag(token: object) -> list[tuple[str, bool]]:
    content = _content(token)
    return [(content, isinstance(token, Mapping) and bool(token.get("normalized")))] if content else []


def _content(token: object) -> str | None:
    """A special token as a string, or as the record that transformers writes for one."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
