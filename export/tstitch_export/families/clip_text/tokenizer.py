"""CLIP's tokenizer as one ``tokenizer.json`` for the ``tokenizers`` library, made from a pipeline's tokenizer folder.

The rules are those of CLIP (arXiv 2103.00020; github.com/openai/CLIP, simple_tokenizer.py) as transformers'
CLIPTokenizer has them: NFC, runs of white space to one blank, lower case; a split into contractions, words, single
digits and runs of the rest; bytes as printable characters; byte pairs merged by rank, a word's last with ``</w>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.read import VOCABULARY_BYTES, read_text
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.needs import require
from tstitch_export.checkpoint.folder import read_json

__all__ = ["ClipTokenizer", "read_tokenizer"]

_PATTERN: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_END_OF_TEXT: Final = "<|endoftext|>"
_DEFAULTS: Final = {
    "bos_token": "<|startoftext|>",
    **dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END_OF_TEXT),
}
_LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
_END: Final = "</w>"
_MOST_TOKENS: Final = 10_000_000


@dataclass(frozen=True)
class ClipTokenizer:
    """``special``: the tokens that are looked for in a text first, with their ids: begin, end, pad, unknown and added
    ones (textual inversion). ``normalised``: those that match the lower-case text; ``words``: whole words only.

    ``longest``: the number of tokens that pipelines pad a text to, where the files say one.
    """

    folder: Path
    files: tuple[Path, ...]
    vocabulary: Mapping[str, int] = field(repr=False)
    merges: Sequence[tuple[str, str]] = field(repr=False)
    special: Mapping[str, int]
    normalised: frozenset[str]
    words: frozenset[str]
    begin: str
    end: str
    unknown: str
    longest: int | None
    bos: int
    eos: int
    pad: int

    @property
    def size(self) -> int:
        return max(max(self.vocabulary.values()), *self.special.values()) + 1

    def with_tokens(self, tokens: Mapping[str, int]) -> ClipTokenizer:
        """With these tokens and ids as well, which match the lower-case text."""
        return replace(self, special={**self.special, **tokens}, normalised=self.normalised | tokens.keys())

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
                unk_token=self.unknown,
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
                tokenizers.AddedToken(
                    token, special=True, normalized=token in self.normalised, single_word=token in self.words
                )
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
    listed = settings.get("added_tokens_decoder")
    # transformers reads the older file only where the newer one has no list of its own, and then it goes first.
    stated = settings if listed is not None else {**settings, **(read_json(folder / "special_tokens_map.json") or {})}
    _check_settings(settings, folder)
    named = (token for key, token in stated.items() if key.endswith("_token"))
    special = {content: _flags(token) for token in (*named, *_extra(stated)) if (content := _content(token))}
    begin, end, unknown, pad = (_content(stated.get(key)) or default for key, default in _DEFAULTS.items())
    if split:  # added_tokens.json says no more than the ids
        added = {token: entry._replace(normalised=token not in special) for token, entry in added.items()}
    added = {**added, **_listed(listed, folder)}
    known = {**{token: entry.number for token, entry in added.items()}, **vocabulary}
    looked_for = dict.fromkeys((*added, begin, end, unknown, pad, *special))
    for token in looked_for:
        if token not in known:
            raise BadCheckpoint(
                f"{folder}: the special token {token!r} is not in the vocabulary of {len(vocabulary)} tokens",
                hint="copy vocab.json, merges.txt and tokenizer_config.json from the same tokenizer",
            )
    if split and whole.is_file():
        _check_same(folder, _read_whole(whole), vocabulary, known)
    # As transformers settles it: the added tokens decide, else the last of the tokens named one by one.
    flags = {**special, **{token: (entry.normalised, entry.word) for token, entry in added.items()}}
    names = ("vocab.json", "merges.txt", "added_tokens.json") if split else (whole.name,)
    files = (*names, "special_tokens_map.json", "tokenizer_config.json")
    return ClipTokenizer(
        folder=folder,
        files=tuple(folder / name for name in files if (folder / name).is_file()),
        vocabulary=vocabulary,
        merges=merges,
        special={token: known[token] for token in looked_for},
        normalised=frozenset(token for token, (normalised, _) in flags.items() if normalised),
        words=frozenset(token for token, (_, word) in flags.items() if word),
        begin=begin,
        end=end,
        unknown=unknown,
        longest=_longest(settings),
        bos=known[begin],
        eos=known[end],
        pad=known[pad],
    )


class _Added(NamedTuple):
    number: int
    normalised: bool
    word: bool = False


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
    if (data.get("padding") or {}).get("direction") == "Left":
        raise BadCheckpoint(
            f"{file} pads on the left", hint="give the tokenizer that the text encoder was trained with"
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
            str(entry["content"]): _Added(int(number), *_flags(entry))
            for number, entry in dict(entries or {}).items()  # type: ignore[call-overload]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{file} is damaged: {error!r}", hint="download or copy it again") from None


def _numbered(tokens: Mapping[str, Any], file: Path) -> dict[str, int]:
    numbers = list(tokens.values())
    if any(type(n) is not int or not 0 <= n <= _MOST_TOKENS for n in numbers) or len(set(numbers)) != len(numbers):
        raise BadCheckpoint(f"{file} gives a token no id of its own", hint="download or copy it again")
    return dict(tokens)


def _flags(token: object) -> tuple[bool, bool]:
    """Whether a token matches the lower-case text, and whether whole words only."""
    record = token if isinstance(token, Mapping) else {}
    return bool(record.get("normalized", False)), bool(record.get("single_word", False))


def _extra(stated: Mapping[str, Any]) -> list[object]:
    """Special tokens without a role of their own."""
    found: list[object] = []
    for key in _LISTS:
        tokens = stated.get(key) or ()
        found += tokens.values() if isinstance(tokens, Mapping) else tokens if isinstance(tokens, list) else []
    return found


def _longest(settings: Mapping[str, Any]) -> int | None:
    """``None`` too for the huge number that transformers writes where there is no limit."""
    number = settings.get("model_max_length", settings.get("max_len"))
    return number if type(number) is int and number <= _MOST_TOKENS else None


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Raises ``BadCheckpoint`` for what would make other tokens than CLIP's tokenizers make."""
    for key, allowed in (("padding_side", "right"), ("split_special_tokens", False)):
        if settings.get(key) not in (None, allowed):
            raise BadCheckpoint(
                f"{folder / 'tokenizer_config.json'}: {key} is {settings[key]!r}; allowed is {allowed!r}",
                hint="give the tokenizer that the text encoder was trained with",
            )


def _check_same(folder: Path, whole: _Parts, vocabulary: Mapping[str, int], known: Mapping[str, int]) -> None:
    """Readers differ in which of the files they take."""
    theirs, _, added = whole
    for token, number in {**theirs, **{token: entry.number for token, entry in added.items()}}.items():
        if known.get(token) != number:
            raise BadCheckpoint(
                f"{folder}: the token {token!r} is {number} in tokenizer.json and {known.get(token)} in vocab.json and "
                "the files beside it",
                hint="save the tokenizer again with tokenizer.save_pretrained(DIR) into an empty folder",
            )
    if theirs.keys() != vocabulary.keys():
        raise BadCheckpoint(
            f"{folder}: tokenizer.json has {len(theirs)} tokens and vocab.json {len(vocabulary)}",
            hint="copy all files from the same tokenizer",
        )


def _content(token: object) -> str | None:
    """A special token as a string, or as the record that transformers writes for one."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
