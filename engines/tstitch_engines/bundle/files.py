"""Files that survive: hashing, durable writes, and temporary directories that name a living owner."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident

from tstitch_engines.bundle.manifest import Component
from tstitch_engines.bundle.read import open_regular

__all__ = [
    "copy_component",
    "describe_file",
    "exchange",
    "hash_file",
    "hold",
    "remove_stale",
    "replace_file",
    "sync",
    "temporary_directory",
    "write_durably",
]

_log = logging.getLogger(__name__)

_CHUNK = 1 << 22
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


def hash_file(path: Path) -> tuple[str, int]:
    """The sha256 of a file in hex, and its size in bytes."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()


def copy_component(source: Path, root: Path, relative: str) -> Component:
    """Copies ``source`` to ``root / relative``, flushed to disk, and describes what was written."""
    target = root / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    size = 0
    with open_regular(source) as stream, target.open("xb") as out:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return Component(path=relative, sha256=digest.hexdigest(), bytes=size)


def describe_file(path: Path) -> Component:
    """The file at ``path`` as a component of its own folder."""
    sha256, size = hash_file(path)
    return Component(path=path.name, sha256=sha256, bytes=size)


def replace_file(path: Path, content: bytes) -> None:
    """Writes ``path`` so that a reader sees the old content or all of the new. Raises ``OSError``.

    Any number of processes and threads may do so at once: one of their contents stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}")
    try:
        scratch.unlink(missing_ok=True)
        with scratch.open("xb") as out:  # through no link that lies there
            out.write(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def sync(path: Path) -> None:
    """Flushes a file, or a directory's own entries, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(path: Path) -> int:
    """A handle of the directory ``path`` with a shared lock, which it waits for. Raises ``FileNotFoundError``."""
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # another one lies there meanwhile


@contextmanager
def temporary_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A fresh directory in ``parent``, removed at the end unless it was renamed away.

    It stays locked while its owner lives. The kernel drops the lock of a killed process, which is how
    ``remove_stale`` knows what was left behind; a process number in the name could have been reused.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            path.chmod(0o755)  # mkdtemp makes it private; a bundle is as readable as any other output
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another process took it for stale
        fcntl.flock(handle, fcntl.LOCK_EX)
        if path.is_dir() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)  # the same, a moment later
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def remove_stale(parent: Path, prefix: str) -> None:
    """Removes the temporary directories of processes that died."""
    for path in parent.glob(f"{prefix}*"):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # gone meanwhile, or not a directory of ours
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner lives
        else:
            _log.info("removing %s, left behind by an interrupted build", path)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def exchange(a: Path, b: Path) -> bool:
    """Swaps two paths in one atomic step (Linux ``renameat2``); ``False`` where kernel or file system can't."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None, use_errno=True)
        paths = (os.fsencode(a), os.fsencode(b))
        return bool(libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
    return False
