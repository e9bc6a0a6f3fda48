"""Files that somebody else made: whatever they are, an answer at once and within the limits."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.read import (
    CONFIG_BYTES,
    DEPTH,
    RECIPE_BYTES,
    VALUES,
    decode_json,
    read_bounded,
    read_json,
    read_text,
    read_toml,
)


def _short(value: str | bytes) -> str:
    return value if isinstance(value, str) else ""


def test_only_regular_files_are_read_and_none_is_waited_for(tmp_path: Path) -> None:
    pipe, loop, listener = tmp_path / "pipe", tmp_path / "loop", socket.socket(socket.AF_UNIX)
    os.mkfifo(pipe)
    loop.symlink_to("loop")
    listener.bind(str(tmp_path / "socket"))
    for path, word in ((pipe, "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(DecodeError, match=f"it is {word}, not a regular file"):
            read_bounded(path, 100)
    for path in (loop, tmp_path / "socket"):
        with pytest.raises(OSError, match=r"links|No such device"):
            read_bounded(path, 100)
    listener.close()
    (tmp_path / "text").write_text("{}")
    (tmp_path / "link").symlink_to("text")
    assert read_json(tmp_path / "link", 2) == {}, "a link to a file is a file"


def test_size_is_what_is_read_and_not_what_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(DecodeError, match=r"it has 5 bytes; allowed are 4"):
        read_bounded(path, 4)
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(DecodeError, match=r"it has 11 bytes; allowed are 10"):
        read_bounded("/proc/self/maps", 10)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DecodeError, match=r"it has 1,099,511,627,776 bytes"):
        read_bounded(path, CONFIG_BYTES)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[" * 1_500_000, "nested deeper than 64"),
        (b"[" * 500_000 + b"]" * 500_000, "nested deeper than 64"),
        (b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), "nested deeper than 64"),
        (b"[" + b"[]," * VALUES, "more than 2,000,000 values"),
        (b"[" * 10, "no JSON"),
        (b"9" * 5000, "a number of 5,000 digits"),
        (b"[1e999]", "1e999, which is not finite"),
        (b"[-1" + b"0" * 400 + b".0]", "not finite"),
        (b"[NaN]", "NaN, which JSON does not know"),
        (b"[-Infinity]", "-Infinity, which JSON does not know"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        (rb'["\ud800"]', "half a character"),
        (rb'{"\u0000": 1}', "NUL"),
        (b'"\xff"', "no UTF-8 text: invalid start byte at byte 1"),
        (b'"' + b'\\"' * 1_000_000, "no JSON: Unterminated string"),
        (b'"\\"' * 1_000_000, "no JSON"),
        (b"\0", "no JSON"),
        (b"", "no JSON"),
    ],
    ids=_short,
)
def test_json_outside_its_bounds_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(DecodeError, match=problem):
        decode_json(content)


def test_json_within_its_bounds() -> None:
    deep = b"[" * DEPTH + b'"[[[", 1' + b"]" * DEPTH
    assert str(decode_json(deep)).count("[") == DEPTH + 3, "brackets in strings do not count"
    assert decode_json(rb'["\ud83d\ude00", "\\u0000"]') == ["\U0001f600", r"\u0000"]
    assert decode_json(b"[1000000000000000019884624838656]") == [int(1e30)], "transformers' model_max_length"
    assert decode_json(b"[-Infinity]", infinite=True) == [-float("inf")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a = " + b"[" * 100_000, "nested deeper"),
        (b"a = " + b"{a = " * 20_000, "nested deeper"),
        (b"a" + b".a" * 60_000 + b" = 1", "a line with more than 128 dots"),
        (b"a" + b".a" * 100 + b" = 1", "nested deeper"),
        (b"a = " + b"9" * 5000, "digits"),
        (b"a = 0x" + b"f" * 5000, "a number of more than 40 digits"),
        (b"a = nan", "the number nan"),
        (b"a = 1e999", "not finite"),
        (b"a = 1\0", "NUL"),
        (b"a = ", "no valid TOML"),
        (b"\xff", "no UTF-8"),
        (b"#" * (RECIPE_BYTES + 1), "131,073 bytes; allowed are 131,072"),
    ],
    ids=_short,
)
def test_toml_outside_its_bounds_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=problem):
        read_toml(path, RECIPE_BYTES)


def test_text_has_no_nul(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"a\0b")
    with pytest.raises(DecodeError, match="NUL"):
        read_text(path, 10)
