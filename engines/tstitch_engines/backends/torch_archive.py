"""What an archive of ``torch.export`` holds, checked before PyTorch opens it: no pickled objects, no libraries.

``torch.export.load`` unpickles whatever an archive marks as pickled, falls back to full unpickling where a restricted
one fails, and opens libraries under ``data/aotinductor`` (read in PyTorch 2.13: ``export/pt2_archive/_package.py``,
``_export/serde/serialize.py``). An archive of ours holds tensors as plain bytes. Others, of up to PyTorch 2.8, hold
them as restricted pickles, which must load as such.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, NamedTuple

from tstitch_engines.bundle.read import decode_json, open_regular
from tstitch_engines.errors import BadEngine, Unsafe, first_line

__all__ = ["check_archive"]

_MEMBERS: Final = 100_000
_TABLE_BYTES: Final = 64 << 20
_CONFIG_BYTES: Final = 64 << 20
_NAME: Final = r"[A-Za-z0-9_.-]+"
_PLAIN: Final = re.compile(
    rf"models/model\.json|data/weights/weight_\d+|data/constants/tensor_\d+|extra/{_NAME}|archive_format|archive_version"
    r"|byteorder|version|\.data/version|\.data/serialization_id|\.format_version|\.storage_alignment"
    r"|serialized_exported_program\.json"
)
_CONFIGS: Final = re.compile(r"data/(?:weights/model_weights|constants/model_constants)_config\.json")
_PICKLED: Final = re.compile(
    r"data/sample_inputs/model\.pt|data/(?:weights|constants)/model\.pt"
    r"|serialized_(?:state_dict|constants|example_inputs)\.pt"
)
_PATHS: Final = re.compile(r"weight_\d+|tensor_\d+")

_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_MANY: Final = 0xFFFF_FFFF


class _Member(NamedTuple):
    offset: int
    size: int


def check_archive(torch: Any, path: Path) -> None:
    """Raises ``Unsafe`` for an archive with pickled objects or unknown members, ``BadEngine`` for a damaged one.

    A restricted pickle is loaded here, as PyTorch does first; where that fails PyTorch would go on without limits.
    """
    try:
        with open_regular(path) as file:
            members = _table(file)
            for name, member in members.items():
                _check_member(torch, file, name, member)
    except _Refused as error:
        raise Unsafe(
            f"the engine {path.name} is refused: {error}",
            hint="do not trust its source; build the bundle again: tstitch-trt build RECIPE --backend torch --fresh",
        ) from None
    except (OSError, ValueError, struct.error) as error:
        raise BadEngine(
            f"PyTorch can't load the engine {path.name}: {error}",
            hint="build the bundle again: tstitch-trt build RECIPE --backend torch --fresh -o BUNDLE",
        ) from None


class _Refused(Exception):
    pass


def _check_member(torch: Any, file: BufferedReader, name: str, member: _Member) -> None:
    if _CONFIGS.fullmatch(name):
        if member.size > _CONFIG_BYTES:
            raise ValueError(f"its member {name} has {member.size:,} bytes; allowed are {_CONFIG_BYTES:,}")
        _check_config(name, decode_json(_at(file, *member)))
    elif _PICKLED.fullmatch(name):
        if member.size:
            _check_pickled(torch, name, _at(file, *member))
    elif not _PLAIN.fullmatch(name):
        raise _Refused(f"its member {name[:80]!r} is none of an exported program's; PyTorch may run what it holds")


def _check_config(name: str, config: Any) -> None:
    """Every tensor by name: a file of the archive with plain bytes."""
    entries = config.get("config") if isinstance(config, Mapping) else None
    if not isinstance(entries, Mapping):
        raise ValueError(f"{name} has no 'config'")
    for key, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}: {key[:80]!r} is no object")
        place, pickled = entry.get("path_name"), entry.get("use_pickle")
        if pickled is not False or not isinstance(place, str) or not _PATHS.fullmatch(place):
            raise _Refused(f"{name} says that {key[:80]!r} is a pickled object ({str(place)[:80]!r})")


def _check_pickled(torch: Any, name: str, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever its opcodes lead to
        raise _Refused(f"its member {name} holds more than tensors: {first_line(error)}") from None


def _table(file: BufferedReader) -> dict[str, _Member]:
    """The members by name, without the folder that all of them are in.

    Stricter than any reader of zip files, so that PyTorch's and Python's find the same members as this one: the table
    of contents at the very end, nothing compressed or encrypted, no two names alike, each within the file.
    """
    size = os.fstat(file.fileno()).st_size
    if size < _END.size:
        raise ValueError(f"it has {size} bytes: truncated")
    end = size - _END.size
    mark, disk, first_disk, here, count, table_size, table, comment = _END.unpack(_at(file, end, _END.size))
    if mark != b"PK\5\6" or comment or disk or first_disk or here != count:
        raise ValueError("it is no whole zip file: it does not end in a table of contents")
    if end >= _LOCATOR.size + _END64.size:
        mark, _, at, disks = _LOCATOR.unpack(_at(file, end - _LOCATOR.size, _LOCATOR.size))
        if mark == b"PK\6\7":
            end -= _LOCATOR.size + _END64.size
            if at != end or disks > 1:
                raise ValueError("its table of contents is not at its end")
            short = (count, table_size, table)
            mark, length, *_, here, count, table_size, table = _END64.unpack(_at(file, at, _END64.size))
            same = all(a in (b, _MANY, 0xFFFF) for a, b in zip(short, (count, table_size, table), strict=True))
            if mark != b"PK\6\6" or length != _END64.size - 12 or here != count or not same:
                raise ValueError("its table of contents is damaged")
    if table + table_size != end or count > _MEMBERS or table_size > _TABLE_BYTES:
        raise ValueError(f"its table of contents of {count} members has {table_size} bytes at {table} of {size}")
    content, at = _at(file, table, table_size), 0
    found: dict[str, _Member] = {}
    for _ in range(count):
        fields = _ENTRY.unpack_from(content, at)
        mark, flags, method, packed, length = fields[0], fields[3], fields[4], fields[8], fields[9]
        words, extra, note, offset = *fields[10:13], fields[16]
        at += _ENTRY.size
        name = content[at : at + words].decode("ascii", "replace")
        if _MANY in (packed, length, offset):
            packed, length, offset = _wide(content[at + words : at + words + extra], packed, length, offset)
        at += words + extra + note
        if mark != b"PK\1\2" or at > len(content):
            raise ValueError("its table of contents is damaged")
        if method or packed != length or flags & 1:
            raise ValueError(f"its member {name[:80]!r} is compressed or encrypted")
        found_at = _start(file, name, offset)
        if found_at + length > table:
            raise ValueError(f"its member {name[:80]!r} reaches beyond the members")
        if name in found:
            raise _Refused(f"its member {name[:80]!r} comes twice")
        found[name] = _Member(found_at, length)
    if at != len(content):
        raise ValueError("its table of contents is damaged")
    return _without_folder(found)


def _without_folder(members: dict[str, _Member]) -> dict[str, _Member]:
    """PyTorch's archives have one folder, those of up to PyTorch 2.7 none. PyTorch finds names whatever their case."""
    folders = {name.partition("/")[0] for name in members if "/" in name}
    inside = all("/" in name for name in members) and len(folders) == 1
    plain = {name.partition("/")[2] if inside else name: member for name, member in members.items()}
    if len({name.lower() for name in plain}) != len(plain):
        raise _Refused("two of its members have one name")
    return plain


def _wide(extra: bytes, packed: int, length: int, offset: int) -> tuple[int, int, int]:
    """The sizes and offset of a member beyond 4 GiB, from its field of 64-bit numbers."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            try:
                length = next(numbers) if length == _MANY else length
                packed = next(numbers) if packed == _MANY else packed
                offset = next(numbers) if offset == _MANY else offset
            except StopIteration:
                break
            return packed, length, offset
        at += 4 + size
    raise ValueError("a member of 4 GiB or more has no 64-bit size")


def _start(file: BufferedReader, name: str, offset: int) -> int:
    """Where a member's content starts: behind a header of its own."""
    mark, *_, words, extra = _LOCAL.unpack(_at(file, offset, _LOCAL.size))
    if mark != b"PK\3\4" or _at(file, offset + _LOCAL.size, words).decode("ascii", "replace") != name:
        raise ValueError(f"its member {name[:80]!r} is not where its table of contents says")
    return offset + _LOCAL.size + int(words + extra)


def _at(file: BufferedReader, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise ValueError("it is truncated")
    return content
