"""Content-addressed cache of built components: exports and engines, each under the hash of all that decides it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.files import (
    describe_file,
    hash_file,
    hold,
    remove_stale,
    sync,
    temporary_directory,
    write_durably,
)
from tstitch_engines.bundle.manifest import Component
from tstitch_engines.bundle.read import RECORD_BYTES, read_json
from tstitch_engines.errors import BadInput

__all__ = ["Cache", "Entry", "Stored", "default_root", "prune_stored"]

_log = logging.getLogger(__name__)

_RECORD = "entry.json"
_LAYOUT = "v1"
_STAGING = "building-"
_LOCKS = "locks"


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    key: str
    files: tuple[Component, ...]
    info: dict[str, Any]


def _read_record(folder: Path) -> _Record:
    return convert(read_json(folder / _RECORD, RECORD_BYTES), _Record, word="field")


class Stored(NamedTuple):
    """An entry as a listing shows it: when it was last made or used (seconds since 1970), and what it is."""

    key: str
    used: float
    files: tuple[Component, ...]
    info: dict[str, Any]

    @property
    def what(self) -> str:
        return str(self.info.get("what") or ", ".join(part.path for part in self.files))

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.files)


class Entry:
    """A verified entry: ``files`` maps the names given to ``put`` to paths, ``info`` is what was stored with them.

    It is not pruned before the end of its ``with`` block, or before it is garbage-collected.
    """

    def __init__(self, root: Path, record: _Record, handle: int) -> None:
        self.files = {part.path: root / part.path for part in record.files}
        self.components = record.files
        self.info = record.info
        self.close = weakref.finalize(self, os.close, handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prune_stored(
    entries: list[Stored], remove: Callable[[Stored], bool], *, max_bytes: int | None, older_than: float | None
) -> list[Stored]:
    """What ``Cache.prune`` says of ``entries``, the one used last first; those that ``remove`` took away."""
    now, total, removed = time.time(), 0, []
    for entry in entries:
        old = (older_than is not None and now - entry.used > older_than) or (max_bytes is None and older_than is None)
        if (old or (max_bytes is not None and total + entry.bytes > max_bytes)) and remove(entry):
            removed.append(entry)
        else:
            total += entry.bytes
    return removed


def default_root() -> Path:
    """``$TSTITCH_TRT_CACHE``, else ``tstitch-trt`` in the XDG cache directory. Raises ``BadInput`` without a home."""
    if chosen := os.environ.get("TSTITCH_TRT_CACHE"):
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG rules ignore a relative one
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "tstitch-trt"
    except RuntimeError:
        raise BadInput(
            "this user has no home folder, which the cache would be in", hint="name a folder: TSTITCH_TRT_CACHE=FOLDER"
        ) from None


class Cache:
    """Entries are immutable and appear by rename, so any number of processes may share one cache."""

    def __init__(self, root: Path | None = None, *, fresh: bool = False) -> None:
        """``fresh``: nothing that was there before is found, and what is made replaces it."""
        self.root = (root or default_root()) / _LAYOUT
        self.fresh = fresh
        self._made: set[str] = set()
        self._kept: list[Entry] = []

    def get(self, key: str) -> Entry | None:
        """The entry of ``key``, or ``None``. Every file is read and its sha256 compared: a damaged entry is a miss."""
        if self.fresh and key not in self._made:
            return None
        folder = self._folder(key)
        try:
            entry = self._open(key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("cache entry %s is damaged and is built again: %s", folder, error)
            return None
        for part in entry.components:
            try:
                whole = hash_file(folder / part.path) == (part.sha256, part.bytes)
            except OSError:
                whole = False
            if not whole:
                entry.close()
                _log.warning("cache entry %s is damaged and is built again: %s was altered", folder, part.path)
                return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(folder / _RECORD)  # what `prune` goes by
        return entry

    def keep(self, entry: Entry) -> Entry:
        """``entry``, held for as long as this object lives."""
        self._kept.append(entry)
        return entry

    def _open(self, key: str) -> Entry:
        """The entry of ``key`` as its record has it. Raises ``FileNotFoundError`` only when nothing is there."""
        folder = self._folder(key)
        handle = hold(folder)
        try:
            record = _read_record(folder)
            if record.key != key:
                raise ValueError(f"it is the entry of {record.key}")
        except FileNotFoundError as error:
            os.close(handle)
            raise ValueError(f"it has no {_RECORD}") from error
        except BaseException:
            os.close(handle)
            raise
        return Entry(folder, record, handle)

    def stored(self) -> list[Stored]:
        """All entries, the one used last first. Their files are not read; a damaged record is left out."""
        found = []
        for folder in self._folders():
            path = folder / _RECORD
            try:
                record = _read_record(folder)
                used = path.stat().st_mtime
            except (OSError, DecodeError):
                continue
            found.append(Stored(folder.name, used, record.files, record.info))
        return sorted(found, key=lambda entry: (-entry.used, entry.key))

    def _folders(self) -> list[Path]:
        """The folders of all entries, damaged ones too. ``Path.glob`` fails when another process removes one."""
        return [folder for shard in _listed(self.root) if len(shard.name) == 2 for folder in _listed(shard)]

    def prune(self, *, max_bytes: int | None = None, older_than: float | None = None) -> list[Stored]:
        """Removes entries not used for ``older_than`` seconds, then the least recently used beyond ``max_bytes``.

        With neither limit everything goes, damaged entries too. An entry goes in one step; one that a process has open
        stays. Returns the removed entries.
        """
        remove_stale(self.root, _STAGING)
        removed = prune_stored(
            self.stored(),
            lambda entry: self._remove(self._folder(entry.key)),
            max_bytes=max_bytes,
            older_than=older_than,
        )
        if max_bytes is None and older_than is None:
            for folder in self._folders():
                self._remove(folder)
        for shard in _listed(self.root):
            if len(shard.name) == 2:
                with suppress(OSError):  # not empty
                    shard.rmdir()
        return removed

    def _remove(self, folder: Path) -> bool:
        """``False``, and nothing done, when someone has it open or was faster."""
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._put_aside(folder)
        except BlockingIOError:
            _log.info("cache entry %s is in use and stays", folder)
            return False
        finally:
            os.close(handle)
        return True

    def _put_aside(self, folder: Path) -> None:
        with temporary_directory(self.root, _STAGING) as aside:
            folder.rename(aside / folder.name)

    @contextmanager
    def alone(self, key: str, waiting: Callable[[], object] = lambda: None) -> Iterator[bool]:
        """A lock of ``key`` between processes, so that what takes minutes is made once.

        Gives whether it had to wait; ``waiting`` is called before that. The lock of a killed process is free. Where
        the cache can't be written there is no lock.
        """
        path = self.root / _LOCKS / key
        handle, waited = _locked(path, waiting)
        try:
            yield waited
        finally:
            if handle is not None:
                with suppress(OSError):
                    path.unlink()
                    path.parent.rmdir()  # where it was the last
                os.close(handle)

    def put(self, key: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
        """Makes the entry of ``key``: ``build`` writes the files into an empty folder and returns ``info`` (JSON data).

        When another process stored the same key meanwhile, its entry is returned. An entry that is pruned at once is
        made again. A ``fresh`` one replaces an old one even while another process copies that, whose build then fails
        and can be run again. Raises what ``build`` raises, and ``OSError`` when the cache can't be written.
        """
        while True:
            if (theirs := self._store(key, build)) is not None:
                return theirs
            with suppress(FileNotFoundError):
                return self._open(key)

    def _store(self, key: str, build: Callable[[Path], dict[str, Any]]) -> Entry | None:
        """Makes the entry; another process's, where that was faster."""
        folder = self._folder(key)
        remove_stale(self.root, _STAGING)
        with temporary_directory(self.root, _STAGING) as staging:
            info = build(staging)
            files = []
            for path in sorted(staging.iterdir()):
                sync(path)
                files.append(describe_file(path))
            record = _Record(key=key, files=tuple(files), info=info)
            write_durably(staging / _RECORD, msgspec.json.encode(record))
            sync(staging)
            if self.fresh and folder.exists():
                self._put_aside(folder)
            self._made.add(key)
            try:
                _rename(staging, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if (theirs := self.get(key)) is not None:
                    return theirs
                shutil.rmtree(folder, ignore_errors=True)
                _rename(staging, folder)
            sync(folder.parent)
        return None

    def _folder(self, key: str) -> Path:
        return self.root / key[:2] / key


def _locked(path: Path, waiting: Callable[[], object]) -> tuple[int | None, bool]:
    """A handle of the file ``path``, locked, or ``None`` where there can't be one; and whether it had to wait."""
    waited = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed with its last lock
        except OSError:
            return None, False
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    waiting()
                    waited = True
                fcntl.flock(handle, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle, waited
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner removed it meanwhile


def _rename(staging: Path, folder: Path) -> None:
    """Makes the folder around ``folder`` as often as it is pruned before the rename."""
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            staging.rename(folder)
        except FileNotFoundError:
            if not staging.exists():
                raise
        else:
            return


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
