"""A repository at one commit, as files on disk: those that are needed are downloaded, once."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from threading import get_ident
from typing import Final

import msgspec

from tstitch_engines.bundle.cache import default_root
from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.files import replace_file
from tstitch_engines.bundle.read import RECORD_BYTES, read_json
from tstitch_engines.errors import BadCheckpoint, FailedWork, Unavailable
from tstitch_engines.progress import Progress
from tstitch_export.checkpoint.checkpoint import listed_in
from tstitch_export.hub import remote
from tstitch_export.hub.reference import Reference, is_commit

__all__ = ["Snapshot"]

_log = logging.getLogger(__name__)

_FILES: Final = "files.json"

# The files of a repository, and whether these are all -> those that are needed
Choice = Callable[[Collection[str], bool], Sequence[str]]


class Snapshot:
    """What ``reference`` is now: its ``commit``, and ``root``, a folder that is called as the repository is."""

    def __init__(self, reference: Reference, report: Progress) -> None:
        """Asks for the commit of a branch or tag; without a network it is what it was when it was last asked for.

        Raises ``Unavailable`` where that is not known, ``BadInput`` for a repository or revision that does not exist.
        """
        remote.check_name(reference)
        self._reference = reference
        self._report = report
        self._asked: remote.Listing | None = None
        self.commit = reference.revision if is_commit(reference.revision) else self._resolved()
        self._folder = remote.snapshot_folder(reference, self.commit)
        owner, name = reference.repository.split("/")
        self._records = default_root() / "hub" / f"{owner}--{name}" / self.commit
        self.root = self._linked(name)
        if self._asked is not None:
            self._record(self._asked)

    def fetch(self, choose: Choice) -> None:
        """Has all the files that ``choose`` chooses, and those that an index among them lists.

        Nothing is asked where the local copy has them. Raises ``Unavailable`` where some are missing and can't be
        downloaded, and what ``choose`` raises.
        """
        listing = self._asked or self._recorded()
        if listing is None and not self._is_whole(choose):
            listing = self._ask()
        if listing is not None:
            chosen = choose(listing.sizes, True)
            self._download(chosen)
            self._download(self._shards(chosen))
        if not is_commit(self._reference.revision):
            remote.remember(self._reference, self.commit)

    def _resolved(self) -> str:
        known = remote.cached_commit(self._reference)
        try:
            self._asked = remote.ask(self._reference)
        except remote.Unreachable as error:
            if known is None:
                raise self._offline("no copy", error) from None
            _log.warning("%s: %s; taken is what it was when it was last asked for, %s", self._reference, error, known)
            return known
        _log.info("%s is commit %s", self._reference, self._asked.commit)
        return self._asked.commit

    def _ask(self) -> remote.Listing:
        """The files of the commit."""
        if self._asked is not None:
            return self._asked
        try:
            found = remote.ask(Reference(self._reference.repository, self._reference.path, self.commit))
        except remote.Unreachable as error:
            raise self._offline("no whole copy", error) from None
        self._asked = remote.Listing(self.commit, found.sizes)
        self._record(self._asked)
        return self._asked

    def _record(self, listing: remote.Listing) -> None:
        """Keeps the files of the commit, which stay the same."""
        with suppress(OSError):  # a cache that may only be read
            replace_file(self._records / _FILES, json.dumps(listing.sizes).encode())

    def _recorded(self) -> remote.Listing | None:
        """The files of the commit, as they were kept."""
        with suppress(OSError, DecodeError, msgspec.ValidationError):
            sizes = msgspec.convert(read_json(self._records / _FILES, RECORD_BYTES), dict[str, int])
            return remote.Listing(self.commit, sizes)
        return None

    def _is_whole(self, choose: Choice) -> bool:
        """Whether a local copy that others made has what is needed."""
        names = [file.relative_to(self._folder).as_posix() for file in self._folder.rglob("*") if file.is_file()]
        try:
            return bool(names) and all((self._folder / name).is_file() for name in self._shards(choose(names, False)))
        except BadCheckpoint:
            return False

    def _shards(self, chosen: Sequence[str]) -> list[str]:
        """The files that the indices among the ``chosen`` list. Raises ``BadCheckpoint``."""
        found = []
        for index in (name for name in chosen if name.endswith(".json") and ".index." in name):
            start = index.rpartition("/")[0]
            found += [f"{start}{start and '/'}{name}" for name in listed_in(self._folder / index)]
        return found

    def _download(self, names: Sequence[str]) -> None:
        missing = [name for name in names if not (self._folder / name).is_file()]
        if not missing:
            return
        sizes = self._ask().sizes
        if absent := [name for name in missing if name not in sizes]:
            raise BadCheckpoint(
                f"{self._reference.repository} has no {absent[0]!r}, which its index lists",
                hint="name another repository",
            )
        total, done = sum(sizes[name] for name in missing), 0
        files = f"{len(missing)} file{'s' if len(missing) > 1 else ''}"
        _log.info("%s: downloading %s, %.1f MB", self._reference, files, total / 1e6)
        for name in missing:

            def tick(written: int, before: int = done, name: str = name) -> None:
                share = f"{(before + written) / 1e6:.0f} of {total / 1e6:.0f} MB"
                self._report(f"downloading {self._reference.repository}/{name}: {share}", 0.0)

            tick(0)
            try:
                remote.download(self._reference, self.commit, name, tick)
            except remote.Unreachable as error:
                raise self._offline("no whole copy", error) from None
            done += sizes[name]

    def _linked(self, name: str) -> Path:
        """A link to the local copy that is called ``name``, as messages and manifests call it."""
        link = self._records / name
        if link.is_symlink() and link.readlink() == self._folder.absolute():
            return link
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            made = link.with_name(f"{name}.{os.getpid()}-{get_ident()}")
            made.unlink(missing_ok=True)
            made.symlink_to(self._folder.absolute(), target_is_directory=True)
            made.replace(link)
        except OSError as error:
            raise FailedWork(f"{link} can't be written: {error}", hint="set TSTITCH_TRT_CACHE to a folder") from None
        return link

    def _offline(self, copy: str, error: remote.Unreachable) -> Unavailable:
        reference = self._reference
        words = ["hf download", reference.repository, reference.path]
        words += [] if reference.revision == "main" else [f"--revision {reference.revision}"]
        return Unavailable(
            f"{reference}: there is no file or folder of this name, {copy} of the repository in "
            f"{remote.cache_folder(reference)}, and {error}",
            hint=f"with a network: {' '.join(filter(None, words))}; copy its cache here and name it (HF_HOME=DIR), or "
            "give the path of a local copy",
        )
