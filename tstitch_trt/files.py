"""Files that appear whole or not at all: written beside their place and renamed into it."""

from __future__ import annotations

import math
import os
import re
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.read import TEXT_BYTES, open_regular, read_text
from tstitch_engines.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "HALF_WRITTEN",
    "Arrays",
    "atomic_file",
    "load_array",
    "open_arrays",
    "read_lines",
    "require_output",
    "require_parent",
    "save_array",
    "write_bytes",
    "write_text",
]

_ARRAYS: Final = 1000  # of one archive
_HEADER_BYTES: Final = 4096
_PIECE: Final = 1 << 20
_RATIO: Final = 200  # of what is unpacked to what is stored, beyond _UNPACKED bytes: deflate can do 1032
_UNPACKED: Final = 64 << 20

HALF_WRITTEN: Final = ".*." + 8 * "[0-9a-f]" + ".part"
"""The names of what ``atomic_file`` leaves behind where its process is killed, for ``glob``."""


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends, and vanishes when it raises."""
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    # Not mkstemp's 0600, which would surprise whoever shares the folder; and to ask for the umask is to set it, for all
    # threads.
    handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a full disk shows here, before anything is replaced
        os.replace(name, path)  # noqa: PTH105 (Path.replace would say the same)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def read_lines(path: Path, *, option: str) -> list[str]:
    """The lines of a text file that are not empty. Raises ``BadInput``."""
    try:
        lines = [line.strip() for line in read_text(path, TEXT_BYTES).splitlines()]
    except (OSError, DecodeError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read as text: {error}"
        raise BadInput(f"{option} {path} {problem}", hint="give a UTF-8 text file with one entry a line") from None
    if not any(lines):
        raise BadInput(f"{option} {path} has no entry", hint="write one entry a line")
    return [line for line in lines if line]


def save_array(path: Path, array: Any) -> None:
    """Writes one numpy array as ``.npy``."""
    import numpy as np

    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path, *, option: str) -> Any:
    """The array in an ``.npy`` file, never unpickled. Raises ``BadInput`` for any other file."""
    how = f'write it with numpy.save("latents.npy", array) or --latents-out, then pass {option} latents.npy'
    try:
        with open_regular(path) as file:
            if file.read(4) == b"PK\3\4":
                raise DecodeError("it holds several arrays; allowed is a .npy file of one", "")
            file.seek(0)
            return _read_npy(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise BadInput(f"{option}: {str(path)!r} is no file", hint=how) from None
    except (ValueError, EOFError, OSError) as error:
        raise BadInput(f"{option}: {str(path)!r} is no .npy file of numbers: {error}", hint=how) from None


@contextmanager
def open_arrays(path: Path) -> Iterator[Arrays]:
    """The arrays of an ``.npz`` file, each read when it is asked for.

    Raises ``OSError``, or ``ValueError`` for a file that is none; so does reading an array.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            archive = zipfile.ZipFile(_Pieces(file))
        except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
            raise ValueError(f"it is no .npz archive: {error}") from None
        yield Arrays(archive, size)


class Arrays:
    """The arrays of an open archive, none of them unpickled; ``names`` of all."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        """``size``: the archive's own in bytes."""
        self._archive = archive
        self._members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if len(self._members) != len(archive.infolist()) or len(self._members) > _ARRAYS:
            raise ValueError(f"it has {len(archive.infolist()):,} arrays, or two of one name; allowed are {_ARRAYS}")
        packed, whole = (sum(getattr(m, key) for m in self._members.values()) for key in ("compress_size", "file_size"))
        if packed > size or whole > max(_UNPACKED, _RATIO * size):
            raise ValueError(f"it has {size:,} bytes and says it would unpack to {whole:,}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def read(self, name: str) -> NDArray[Any]:
        member = self._members[name]
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its array {name[:80]!r} is encrypted, or packed as numpy does not")
        try:
            with self._archive.open(member) as file:
                return _read_npy(file, member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"its array {name[:80]!r} is damaged: {error}") from None


class _Pieces:
    """A file that is never asked for much at once: ``zipfile`` reads a directory of any size in one piece."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > _PIECE or len(found := self._file.read(size if size >= 0 else _PIECE + 1)) > _PIECE:
            raise ValueError(f"it is no archive of {_ARRAYS:,} arrays or fewer: its directory is too large")
        return found


# As numpy and its relatives write it. numpy itself reads it with the compiler of Python, which nesting can bring down.
_HEADER: Final = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?[biuf]\d{1,2})',\s*'fortran_order':\s*(True|False),\s*"
    r"'shape':\s*\(((?:\d{1,13}+,?\s*+){0,32}+)\)\s*,?\s*\}\s*"
)


def _read_npy(file: IO[bytes], size: int) -> NDArray[Any]:
    """The array in ``size`` bytes of a file. Raises ``ValueError`` before memory is taken for what is not there."""
    import numpy as np

    begin = file.read(12)
    if begin[:6] != b"\x93NUMPY" or begin[6:8] not in (b"\1\0", b"\2\0"):
        raise ValueError("it does not begin as .npy files of version 1 and 2 do")
    long = begin[6] == 2
    length = int.from_bytes(begin[8 : 12 if long else 10], "little")
    if length > _HEADER_BYTES:
        raise ValueError(f"its header would be {length:,} bytes; allowed are {_HEADER_BYTES:,}")
    header = begin[12 if long else 10 :] + file.read(length - (0 if long else 2))
    if (match := _HEADER.fullmatch(header.decode("latin-1"))) is None:
        raise ValueError(f"its header is {header[:80]!r}; allowed are arrays of numbers")
    try:
        dtype = np.dtype(match[1])
    except TypeError:
        raise ValueError(f"it holds {match[1]}; allowed are numbers") from None
    shape = tuple(int(side) for side in match[3].replace(",", " ").split())
    needs, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if needs != there:
        raise ValueError(f"it is {dtype}{list(shape)}, {needs:,} bytes, and has {there:,}")
    found = np.empty(math.prod(shape), dtype)
    rest = memoryview(found.view(np.uint8).data)
    while rest:
        if not (count := file.readinto(rest[:_PIECE])):  # type: ignore[attr-defined]
            raise ValueError("it ends in the middle of the array")
        rest = rest[count:]
    return found.reshape(shape[::-1]).T if match[2] == "True" else found.reshape(shape)


def require_output(path: Path, *suffixes: str, option: str) -> None:
    """Raises ``BadInput`` when ``path`` has none of the ``suffixes``, is a folder, or can't be written."""
    if path.suffix.lower() not in suffixes or path.is_dir():
        right = path.parent / f"{path.stem or 'out'}{suffixes[0]}"
        raise BadInput(
            f"{option} {str(path)!r} is no {suffixes[0]} file; allowed: FILE{suffixes[0]}",
            hint=f"write {option} {right}",
        )
    require_parent(path, option=option)


def require_parent(path: Path, *, option: str) -> None:
    """Raises ``BadInput`` when ``path`` can't be written because its folder does not exist."""
    if not path.parent.is_dir():
        raise BadInput(
            f"{option} {str(path)!r}: the folder {str(path.parent)!r} does not exist",
            hint=f"make it first: mkdir -p {path.parent}",
        )
