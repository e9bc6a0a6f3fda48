"""What an ONNX file would make a library read, found before a library opens it. Needs no library.

A graph may name files with its weights. ONNX Runtime, onnx and TensorRT each have rules of their own for such names,
which differ between versions. So our own come first: a file beside the graph, by its plain name, that the manifest
lists for this graph.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from tstitch_engines.errors import Unsafe

__all__ = ["NotOnnx", "check_onnx"]

_DEPTH: Final = 64  # graphs in graphs; protobuf's own readers stop at 100 messages
_FIELDS: Final = 1_000_000  # some 80,000 nodes
_DIGITS: Final = 19  # of an offset or length
_LONGEST: Final = 4096  # bytes of a name
_KEYS: Final = ("location", "offset", "length", "checksum")

# The messages of onnx.proto that lead to tensors: field number -> kind of message. All other fields are stepped over.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
_INSIDE: Final[dict[int, dict[int, int]]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
}
_NAME, _EXTERNAL, _LOCATION = 8, 13, 14  # of a tensor
_OPERATOR: Final = 4  # of a node
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class NotOnnx(ValueError):
    """A file that is no ONNX model, for the caller to put into an error of its own kind."""


def check_onnx(path: Path, beside: Collection[str] = ()) -> None:
    """Raises ``Unsafe`` for a model that reads a file that is not in ``beside``, ``NotOnnx`` for anything else.

    ``beside``: names, without folders, of the files in its folder that it may read. They and ``path`` may then be no
    links. Weights in the file are stepped over, so a large file takes no longer.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise NotOnnx(f"{path.name} is not a regular file")
            if not state.st_size:
                raise NotOnnx(f"{path.name} is empty")
            with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as data:
                _Scan(path, data, beside).run()
        finally:
            os.close(handle)
    except OSError as error:
        raise NotOnnx(f"{path.name} can't be read: {error.strerror}") from None


_HINT: Final = "build the bundle again, or export the network again with its weights in the file"


class _Scan:
    def __init__(self, path: Path, data: mmap.mmap, beside: Collection[str]) -> None:
        self._path = path
        self._data = data
        self._beside = beside
        self._count = 0

    def run(self) -> None:
        data = self._data
        if data[4:8] == b"ORTM":
            raise self._damaged("it is in ONNX Runtime's own format, which only ONNX is turned into")
        waiting = [(0, len(data), _MODEL, 0)]
        graphs = 0
        while waiting:
            start, end, kind, depth = waiting.pop()
            if kind == _TENSOR:
                self._tensor(start, end)
                continue
            inside = _INSIDE[kind]
            for number, wire, first, last in self._fields(start, end):
                if wire != _BYTES:
                    continue
                if number in inside:
                    deeper = depth + (inside[number] == _GRAPH)
                    if deeper > _DEPTH:
                        raise self._damaged(f"its graphs are nested deeper than {_DEPTH}")
                    waiting.append((first, last, inside[number], deeper))
                    graphs += kind == _MODEL and inside[number] == _GRAPH
                elif kind == _NODE and number == _OPERATOR and self._text(first, last) == "EPContext":
                    raise self._refused("it has an EPContext node, which is a compiled engine of another library")
        if graphs != 1:
            raise self._damaged(f"it has {graphs} graphs at its top; a model has one")

    def _tensor(self, start: int, end: int) -> None:
        name, external, entries = "", False, []
        for number, wire, first, last in self._fields(start, end):
            if wire == _BYTES and number == _NAME:
                name = self._text(first, last)
            elif wire == _BYTES and number == _EXTERNAL:
                entries.append((first, last))
            elif wire == _VARINT and number == _LOCATION:
                external = external or first != 0
        if not external and not entries:
            return
        said: dict[str, str] = {}
        for start_, end_ in entries:
            words = {
                number: self._text(first, last)
                for number, wire, first, last in self._fields(start_, end_)
                if wire == _BYTES
            }
            key = words.get(1, "")
            if key in said or key not in _KEYS:
                allowed = ", ".join(_KEYS)
                raise self._refused(f"the external data of {name!r} has a {key!r}; allowed once each are {allowed}")
            said[key] = words.get(2, "")
        self._read(name, said)

    def _read(self, name: str, said: dict[str, str]) -> None:
        """Of a tensor with external data: ``said`` has its location, offset and length as texts."""
        location = said.get("location", "")
        what = f"the tensor {name!r} reads {location!r}"
        if not location or location in (".", "..") or set(location) & set("/\\\0:"):
            raise self._refused(f"{what}; allowed is the plain name of a file in the same folder")
        if location not in self._beside:
            listed = ", ".join(sorted(self._beside)) or "none"
            raise self._refused(f"{what}, which is not among the files that belong to it: {listed}")
        file = self._path.parent / location
        for part in (self._path, file):
            if part.is_symlink():
                raise self._refused(f"{what}, and {part.name} is a link")
        state = file.stat()
        if not stat.S_ISREG(state.st_mode):
            raise self._refused(f"{what}, which is not a regular file")
        offset, length = (self._number(what, key, said.get(key, "0")) for key in ("offset", "length"))
        if offset + length > state.st_size:
            raise self._refused(f"{what} from {offset} to {offset + length}, which has {state.st_size} bytes")

    def _number(self, what: str, key: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
            raise self._refused(f"{what} with the {key} {text[:40]!r}; allowed is a number of bytes")
        return int(text)

    def _damaged(self, reason: str) -> NotOnnx:
        return NotOnnx(f"{self._path.name} is no ONNX model: {reason}")

    def _refused(self, reason: str) -> Unsafe:
        return Unsafe(f"{self._path} is refused: {reason}", hint=f"do not trust its source; {_HINT}")

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, wire type, and where it starts and ends (of a varint: its value twice) of every field."""
        data = self._data
        while at < end:
            self._count += 1
            if self._count > _FIELDS:
                raise self._damaged(f"it has more than {_FIELDS:,} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                size, at = self._varint(at, end)
                first, at = at, at + size
                value = (first, at)
            elif wire == _VARINT:
                got, at = self._varint(at, end)
                value = (got, got)
            elif wire in (_FIXED32, _FIXED64):
                first, at = at, at + (4 if wire == _FIXED32 else 8)
                value = (first, at)
            else:
                raise self._damaged(f"at byte {at} is no field of a protobuf message")
            if at > end:
                raise self._damaged(f"a field ends at byte {at} of {len(data)}")
            if number == 0:
                raise self._damaged("a field has the number 0")
            yield (number, wire, *value)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        data = self._data
        value = shift = 0
        while at < end and shift < 70:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
        raise self._damaged(f"a number at byte {at} does not end")

    def _text(self, first: int, last: int) -> str:
        return self._data[first : min(last, first + _LONGEST)].decode(errors="replace")
