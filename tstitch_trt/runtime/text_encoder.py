"""Texts to hidden states: tokens, chunks of 77, and the text encoders' engines.

A text longer than an encoder's 75 tokens goes through it in chunks, each with its own begin and end; the hidden states
are joined, so that nothing is cut off. There is no syntax for weights: brackets and colons are text like any other.

A textual inversion (arXiv 2208.01618) of several vectors has a token for each: ``<cat>``, ``<cat>_1``, ``<cat>_2``...
Its first stands for all of them, as in diffusers' pipelines.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Network
from tstitch_engines.bundle.read import VOCABULARY_BYTES, decode_json, read_bounded
from tstitch_engines.errors import BadBundle, BadInput, first_line
from tstitch_engines.needs import require
from tstitch_trt.request.text import Encoded
from tstitch_trt.runtime.component import Component

__all__ = ["PromptLength", "TextEncoder", "TextEncoders", "TokenLayout", "open_tokenizer"]

_log = logging.getLogger(__name__)

Ids = NDArray[np.int64]

_LONGEST: Final = 200_000  # characters of a prompt whose textual inversions are written out


@dataclass(frozen=True)
class TokenLayout:
    """How tokens are laid out for an encoder: ``tokens`` (77) places, the first ``bos``, ``eos`` behind the text."""

    tokens: int
    bos: int
    eos: int
    pad: int

    @staticmethod
    def of(network: Network) -> TokenLayout:
        tokens = _config_number(network, "tokens", 3, 65_536)
        return TokenLayout(tokens, *(_config_number(network, name, 0, 1 << 24) for name in ("bos", "eos", "pad")))

    @property
    def room(self) -> int:
        """Tokens of the text in one chunk."""
        return self.tokens - 2

    def chunks(self, count: int) -> int:
        """How many chunks ``count`` tokens take; the empty text takes one."""
        return max(1, -(-count // self.room))

    def lay_out(self, ids: Sequence[int], chunks: int) -> Ids:
        """int64 ``[chunks, tokens]``; chunks that are left over are those of the empty text."""
        assert self.chunks(len(ids)) <= chunks, "the text would be cut off"
        rows = np.full((chunks, self.tokens), self.pad, np.int64)
        rows[:, 0] = self.bos
        for row, start in zip(rows, range(0, chunks * self.room, self.room), strict=True):
            part = ids[start : start + self.room]
            row[1 : 1 + len(part)] = part
            row[1 + len(part)] = self.eos
        return rows


@dataclass(frozen=True)
class PromptLength:
    """``tokens``: of a text. ``chunk``: that a text encoder reads at once (75 of CLIP's). ``most``: that the members'
    engines take; a longer text is refused."""

    tokens: int
    chunk: int
    most: int

    @property
    def chunks(self) -> int:
        return max(1, -(-self.tokens // self.chunk))


def open_tokenizer(path: Path) -> Any:
    """A ``tokenizers.Tokenizer``. Raises ``Unavailable`` without that library, ``BadBundle`` for a damaged file."""
    how = "give prompt_embeds= in place of prompt="
    tokenizers = require("tokenizers", "reading prompts", extra="prompt", instead=how)
    with _as_bad_bundle(f"{path} is no tokenizer"):
        content = read_bounded(path, VOCABULARY_BYTES)
        decode_json(content)
        return tokenizers.Tokenizer.from_buffer(content)


@contextmanager
def _as_bad_bundle(what: str) -> Iterator[None]:
    """The errors of ``tokenizers``, which have no type of their own; a panic of it is not even an ``Exception``."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise BadBundle(f"{what}: {first_line(error)}", hint="build the bundle again") from None
        raise


def _config_number(network: Network, key: str, low: int, high: int, default: int | None = None) -> int:
    value = network.config.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise BadBundle(
            f"the config of a text encoder has {key} = {value!r}; allowed is {low} to {high}",
            hint="build the bundle again",
        )
    return value


def inversions(tokenizer: Any) -> dict[str, str]:
    """The first token of each textual inversion with several -> all of them, with blanks between."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    found: dict[str, str] = {}
    for first in sorted(added, key=len, reverse=True):
        others = list(itertools.takewhile(added.__contains__, (f"{first}_{number}" for number in itertools.count(1))))
        if others:
            found[first] = " ".join([first, *others])
    return found


class TextEncoder:
    """One text encoder with its tokenizer, which is opened with the first text."""

    def __init__(self, part: Component, tokenizer: Path) -> None:
        self._part = part
        self._path = tokenizer
        self._tokenizer: Any = None
        self._inversions: Mapping[str, str] = {}
        self.layout = TokenLayout.of(part.network)
        self._known = _config_number(part.network, "vocabulary", 1, 1 << 24, default=1 << 24)

    def tokens(self, text: str) -> list[int]:
        """The tokens of the text alone, without begin and end."""
        if self._tokenizer is None:
            opened = open_tokenizer(self._path)
            self._inversions = inversions(opened)
            self._tokenizer = opened  # last: other threads may count tokens meanwhile
        read = self._read(text)
        here = [first for first in self._inversions if first in read.tokens]
        for first in here:
            text = _replaced(text, first, self._inversions[first])
        ids: list[int] = (self._read(text) if here else read).ids
        if max(ids, default=0) >= self._known:
            raise BadBundle(
                f"{self._path} has the token {max(ids)}, and the text encoder knows {self._known}",
                hint="build the bundle again",
            )
        return ids

    def _read(self, text: str) -> Any:
        with _as_bad_bundle(f"{self._path} can't read the text"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def encode(self, requests: Sequence[Ids]) -> list[Encoded]:
        """Each int64 ``[N, k, tokens]`` -> hidden float32 ``[N, k tokens, D]`` and pooled ``[N, E]`` of first chunks.

        Equal chunks are encoded once. pooled is ``None`` where the encoder has no projection.
        """
        tokens = requests[0].shape[2]
        every = np.concatenate([ids.reshape(-1, tokens) for ids in requests])
        rows, places = np.unique(every, axis=0, return_inverse=True)
        found = self._part({"input_ids": rows})
        hidden, pooled = found["hidden"], found.get("pooled")
        encoded: list[Encoded] = []
        start = 0
        for count, chunks, _ in (ids.shape for ids in requests):
            own = places.reshape(-1)[start : start + count * chunks].reshape(count, chunks)
            start += count * chunks
            states = hidden[own].reshape(count, chunks * tokens, -1)
            encoded.append((states, None if pooled is None else pooled[own[:, 0]]))
        return encoded


def _replaced(text: str, first: str, every: str) -> str:
    """Raises ``BadInput`` for a text that becomes absurdly long."""
    length = len(text) + text.count(first) * (len(every) - len(first))
    if length > _LONGEST:
        raise BadInput(
            f"the prompt has {first!r}, a textual inversion of many vectors, so often that it becomes {length:,} "
            f"characters long; allowed are {_LONGEST:,}",
            hint="use it once",
        )
    return text.replace(first, every)


class TextEncoders:
    """The text encoders of a bundle by part (``text_encoder``, ``text_encoder_2``...)."""

    def __init__(self, encoders: Mapping[str, TextEncoder]) -> None:
        self._encoders = dict(encoders)

    @staticmethod
    def of(bundle: Bundle, parts: Mapping[str, Component]) -> TextEncoders:
        """Those of ``parts`` that have a tokenizer."""
        found: dict[str, TextEncoder] = {}
        for name, part in parts.items():
            if (tokenizer := part.network.files.get("tokenizer")) is not None:
                found[name] = TextEncoder(part, bundle.path(tokenizer))
        return TextEncoders(found)

    def __contains__(self, name: object) -> bool:
        return name in self._encoders

    def length(self, text: str, states: int) -> PromptLength | None:
        """``text`` in the tokens of the encoder that needs most chunks for it; ``None`` where there is no encoder.
        ``states``: the most hidden states that the members take.

        Raises ``Unavailable`` without the library ``tokenizers``, and what ``encode`` raises for a text.
        """
        found = (
            PromptLength(len(one.tokens(text)), one.layout.room, states // one.layout.tokens * one.layout.room)
            for one in self._encoders.values()
        )
        return max(found, key=lambda length: (length.chunks, length.tokens), default=None)

    def encode(self, names: Sequence[str], texts: Sequence[str]) -> dict[str, Encoded]:
        """What each of the encoders ``names`` makes of all ``texts``: hidden ``[N, 77 k, D]`` and pooled ``[N, E]``.

        ``k`` is that of the longest text for any of them, so that prompts, negative prompts and the hidden states of
        two encoders fit together.
        """
        return self.encode_each(names, [texts])[0]

    def encode_each(self, names: Sequence[str], requests: Sequence[Sequence[str]]) -> list[dict[str, Encoded]]:
        """``encode`` for several requests, each with its own ``k``: every encoder runs once for all of them."""
        found: list[dict[str, Encoded]] = [{} for _ in requests]
        chosen = {name: self._encoders[name] for name in names}
        tokens = {name: [[one.tokens(text) for text in texts] for texts in requests] for name, one in chosen.items()}
        chunks = [1] * len(requests)
        for name, encoder in chosen.items():
            for place, rows in enumerate(tokens[name]):
                chunks[place] = max([chunks[place], *(encoder.layout.chunks(len(ids)) for ids in rows)])
        if max(chunks, default=1) > 1:
            longest = max(len(ids) for each in tokens.values() for rows in each for ids in rows)
            _log.info("a text of %d tokens goes through the text encoders in %d chunks", longest, max(chunks))
        for name, encoder in chosen.items():
            laid = [
                np.stack([encoder.layout.lay_out(ids, count) for ids in rows])
                for rows, count in zip(tokens[name], chunks, strict=True)
            ]
            for place, encoded in enumerate(encoder.encode(laid)):
                found[place][name] = encoded
        return found
