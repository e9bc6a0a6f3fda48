"""The header of a ``.safetensors`` file: names, types, shapes and where the bytes lie. No torch."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec

from tstitch_engines.bundle.read import decode_json, open_regular
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.checkpoint.number_types import BITS

__all__ = [
    "SafetensorsEntry",
    "read_header_and_metadata",
    "read_safetensors_header",
    "recognise",
    "shown",
]

_HEADER_BYTES: Final = 16 << 20  # those of the largest models have one
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class SafetensorsEntry(NamedTuple):
    dtype: str  # as the format spells it: F32, F16, BF16, I64...
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    length: int


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=16)]
    data_offsets: tuple[_Size, _Size]


def read_safetensors_header(path: Path) -> dict[str, SafetensorsEntry]:
    """The tensors of a ``.safetensors`` file and where their bytes lie. Raises ``BadCheckpoint`` when it is damaged."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, SafetensorsEntry], dict[str, str]]:
    """The tensors, and what the writer noted beside them. Raises ``BadCheckpoint``.

    The rules are the format's: the tensors' bytes follow each other without a hole, each as many as its shape and type
    need, to the end of the file.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_BYTES):
                raise ValueError(f"its header would be {length:,} bytes of {size:,}; allowed are {_HEADER_BYTES:,}")
            header = decode_json(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        noted = header.pop("__metadata__", None)
        metadata = msgspec.convert({} if noted is None else noted, dict[str, str])
        entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
            if entry.start != end:
                raise ValueError(f"{shown(name)} begins at byte {entry.start:,}, where the one before ends at {end:,}")
            end += entry.length
        if end != size:
            raise ValueError(f"it has {size:,} bytes, its header promises {end:,}")
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{path.name} is not a whole safetensors file: {recognise(path) or error}", hint="download or copy it again"
        ) from None
    return entries, metadata


def _entry(name: str, value: object, base: int) -> SafetensorsEntry:
    try:
        entry = msgspec.convert(value, _Entry)
    except msgspec.ValidationError as error:
        raise ValueError(f"the entry of {shown(name)} is wrong: {error}") from None
    begin, end = entry.data_offsets
    if (bits := BITS.get(entry.dtype)) is None:
        raise ValueError(f"{shown(name)} is of the unknown type {shown(entry.dtype)}")
    if end - begin != (needs := math.prod(entry.shape) * bits // 8):
        shape = "x".join(map(str, entry.shape)) or "1"
        raise ValueError(f"{shown(name)} is {entry.dtype} {shape}, {needs:,} bytes, and has {end - begin:,}")
    return SafetensorsEntry(entry.dtype, entry.shape, base + begin, end - begin)


def shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def recognise(path: Path) -> str | None:
    """What a file is that should have been tensors, where its first bytes tell."""
    try:
        with open_regular(path) as stream:
            head = stream.read(64)
    except OSError:
        return None
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, the weights themselves were not downloaded (git lfs pull)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is an HTML page, probably the answer of a download that failed"
    return None
