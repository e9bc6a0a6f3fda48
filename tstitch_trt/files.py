"""Files that appear whole or not at all: written beside their place and renamed into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tstitch_engines.errors import BadInput

__all__ = ["atomic_file", "load_array", "read_lines", "require_output", "require_parent", "save_array", "write_text"]


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends, and vanishes when it raises."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a full disk shows here, before anything is replaced
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)  # mkstemp's 0600 would surprise whoever shares the folder
        os.replace(name, path)  # noqa: PTH105 (Path.replace would say the same)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def read_lines(path: Path, *, option: str) -> list[str]:
    """The lines of a text file that are not empty. Raises ``BadInput``."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
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
    import numpy as np

    how = f'write it with numpy.save("latents.npy", array) or --latents-out, then pass {option} latents.npy'
    if not path.is_file():
        raise BadInput(f"{option}: {str(path)!r} is no file", hint=how)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadInput(f"{option}: {str(path)!r} is no .npy file of numbers: {error}", hint=how) from None
    if not isinstance(array, np.ndarray):  # an .npz archive
        array.close()
        raise BadInput(f"{option}: {str(path)!r} holds several arrays; allowed is a .npy file of one", hint=how)
    return array


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
