"""Files from outside: opened without waiting, read to a limit, and JSON and TOML decoded within bounds.

A file that somebody else made may be a pipe that nobody writes to, a device without an end, a gigabyte of brackets or
a number of a million digits. Everything here raises ``OSError`` as ``open`` does and ``DecodeError`` (a ``ValueError``)
for the rest, without the file's name: the caller makes an error of its own kind of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from tstitch_engines.bundle.decode import DecodeError

__all__ = [
    "CONFIG_BYTES",
    "MANIFEST_BYTES",
    "RECIPE_BYTES",
    "RECORD_BYTES",
    "STUDY_BYTES",
    "TEXT_BYTES",
    "VOCABULARY_BYTES",
    "NotRegular",
    "decode_json",
    "open_regular",
    "read_bounded",
    "read_json",
    "read_text",
    "read_toml",
]

# The most bytes of a file by kind, each ten times and more what the largest known one has.
RECIPE_BYTES: Final = 128 << 10
RECORD_BYTES: Final = 1 << 20  # small records of ours: entries of caches, times
CONFIG_BYTES: Final = 4 << 20  # config.json, model_index.json, scheduler_config.json, tokenizer_config.json
MANIFEST_BYTES: Final = 8 << 20
STUDY_BYTES: Final = 16 << 20  # its prompts are in it
TEXT_BYTES: Final = 16 << 20  # lists of prompts and names
VOCABULARY_BYTES: Final = 16 << 20  # vocab.json, merges.txt, tokenizer.json; weight maps and indices of shards

DEPTH: Final = 64  # levels of nesting
VALUES: Final = 2_000_000  # of one document: an empty list is 2 bytes in a file and 56 in memory
DIGITS: Final = 40  # of a whole number: transformers writes int(1e30) for "no limit"


class NotRegular(DecodeError, OSError):
    """A pipe, a device, a folder, a socket: for callers that expect what ``open`` raises too."""


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file for reading; links are followed. Never waits, as ``open`` does for the writer of a pipe."""
    # O_NOCTTY: opening a terminal must not make it the process's own
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise NotRegular(f"it is {_kind(mode)}, not a regular file", "give a regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_bounded(path: str | Path, most: int) -> bytes:
    """The whole file, where it has at most ``most`` bytes. What its size is said to be decides nothing."""
    with open_regular(path) as file:
        content = file.read(most + 1)
        if content is None:  # a file of /proc that would wait
            raise NotRegular("it has nothing to read now", "give a regular file")
        if len(content) > most:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise DecodeError(f"it has {size:,} bytes; allowed are {most:,}", "is it the right file?")
    return content


def read_text(path: str | Path, most: int) -> str:
    """A text file of at most ``most`` bytes, in UTF-8 and without NUL."""
    text = _decode_text(read_bounded(path, most))
    if "\0" in text:
        raise DecodeError("it is no text: it has NUL bytes", "give a UTF-8 text file")
    return text


def read_json(path: str | Path, most: int, *, infinite: bool = False) -> Any:
    """The JSON in a file of at most ``most`` bytes; see ``decode_json``."""
    return decode_json(read_bounded(path, most), infinite=infinite)


def decode_json(content: bytes | str, *, infinite: bool = False) -> Any:
    """JSON as dicts, lists and scalars.

    Refused: nesting beyond ``DEPTH``, more than ``VALUES`` values, whole numbers beyond ``DIGITS`` digits, numbers
    beyond float64, repeated keys, NUL and lone surrogates in strings, and what JSON does not know: NaN, and Infinity
    unless ``infinite`` (diffusers writes it into configurations of schedulers).
    """
    text = content if isinstance(content, str) else _decode_text(content)
    _check_size(text)

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name)
        raise DecodeError(f"it has the number {name}, which JSON does not know", "")

    try:
        data = json.loads(
            text, parse_int=_whole, parse_float=_finite, parse_constant=constant, object_pairs_hook=_unrepeated
        )
    except json.JSONDecodeError as error:
        raise DecodeError(f"it is no JSON: {error}", "") from None
    if _ODD_ESCAPE.search(text):
        for value in _walk(data):
            _check_text(value)
    return data


def read_toml(path: str | Path, most: int) -> dict[str, Any]:
    """The TOML in a file of at most ``most`` bytes, within the bounds of ``decode_json``; no infinite numbers."""
    text = read_text(path, most)
    if max(line.count(".") for line in text.split("\n")) > 2 * DEPTH:
        raise DecodeError(
            f"it has a line with more than {2 * DEPTH} dots", ""
        )  # tomllib's memory: dots in a key squared
    try:
        data = tomllib.loads(text, parse_float=_finite)
    except DecodeError:
        raise
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # thousands of digits are one without being a TOMLDecodeError
        raise DecodeError(f"it is no valid TOML: {error}", "mend that line; see toml.io") from None
    for value in _walk(data):  # dotted keys nest too, without a bracket
        if isinstance(value, int) and abs(value) >= 10**DIGITS:
            raise DecodeError(f"it has a number of more than {DIGITS} digits", "")
    return data


def _decode_text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError(f"it is no UTF-8 text: {error.reason} at byte {error.start}", "save it as UTF-8") from None


# To the end of the text where the last quote is missing, and possessive: linear whatever the text is
_BETWEEN = re.compile(r'(?:[^"\[\]{},]++|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z))++', re.DOTALL)
_ODD_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


def _check_size(text: str) -> None:
    """Depth and number of values before the decoder, which recurses in C, sees the text."""
    marks = _BETWEEN.sub("", text)
    if marks.count(",") + marks.count("[") + marks.count("{") >= VALUES:
        raise DecodeError(f"it has more than {VALUES:,} values", "is it the right file?")
    marks = marks.replace(",", "").replace("{", "[").replace("}", "]")
    for _ in range(DEPTH):
        if not (left := marks.replace("[]", "")):
            return
        if len(left) == len(marks):
            break
        marks = left
    if "[]" in marks or marks.count("[") > DEPTH:  # fewer that are not closed are for the decoder to name
        raise _too_deep()


def _too_deep() -> DecodeError:
    return DecodeError(f"it is nested deeper than {DEPTH} levels, or its brackets do not match", "")


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise DecodeError(f"it has a number of {len(text):,} digits; allowed are {DIGITS}", "")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        shown = text if len(text) < 20 else f"{text[:16]}..."
        raise DecodeError(f"it has the number {shown}, which is not finite in float64", "")
    return number


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise DecodeError(f"it has the key {repeated[:80]!r} twice in one object", "")
    return found


def _walk(data: Any) -> Iterator[Any]:
    """All keys and scalars, without recursion. Raises ``DecodeError`` beyond ``DEPTH``."""
    level: list[Any] = [data]
    for _ in range(DEPTH + 1):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                yield from value
                deeper.extend(value.values())
            elif isinstance(value, list):
                deeper.extend(value)
            else:
                yield value
        if not deeper:
            return
        level = deeper
    raise _too_deep()


def _check_text(value: Any) -> None:
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise DecodeError(f"it has the string {value[:40]!a} with NUL or half a character", "")
