"""Checkpoints as a user names them, paths or repositories of Hugging Face, as paths."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.bundle.manifest import Origin, Source
from tstitch_engines.errors import BadCheckpoint
from tstitch_engines.progress import Progress, silent
from tstitch_export.checkpoint.folder import read_json
from tstitch_export.hub.reference import Reference, read_reference
from tstitch_export.hub.selection import select, select_component
from tstitch_export.hub.snapshot import Snapshot

__all__ = ["Checkpoints"]

_DIGEST: Final = 64  # hex digits


class Checkpoints:
    """One build's checkpoints. Every revision is asked for once, so that all its files are of one commit."""

    def __init__(self, report: Progress = silent) -> None:
        self._report = report
        self._snapshots: dict[tuple[str, str], Snapshot] = {}
        self._given: dict[Path, tuple[Snapshot, Reference]] = {}

    def locate(self, given: str | Path, kind: str, *, base: Path | None = None) -> Path:
        """Where the checkpoint ``given`` for a network of ``kind`` (see ``selection.select``) is.

        What exists on disk is a path. Without a revision, so is what would lie in a folder that exists: it may be
        mistyped. A ``Path`` is never a repository. A path that does not exist comes back as it is, for the reader to
        refuse. ``base``: what paths are relative to, if not to the working directory.

        Raises ``BadCheckpoint`` where the repository has no such model, ``BadInput`` where there is none or it may not
        be read, ``Unavailable`` without a network for one that is not in the local cache.
        """
        path = Path(given) if base is None else base / given
        if not isinstance(given, str) or os.path.lexists(path):
            return path
        reference = read_reference(given)
        if reference is None:
            return path
        owner = reference.repository.partition("/")[0]
        if "@" not in given and (Path(owner) if base is None else base / owner).is_dir():
            return path
        snapshot = self._snapshot(reference)
        found = reference.path

        def choose(names: Collection[str], whole: bool) -> Sequence[str]:
            nonlocal found
            found, files = select(names, reference.path, kind, where=reference.repository, whole=whole)
            return files

        snapshot.fetch(choose)
        located = snapshot.root / found
        self._given[located] = snapshot, replace(reference, path=found)
        return located

    def add(self, pipeline: Path, part: str) -> None:
        """Has the folder ``part`` of a ``pipeline`` that ``locate`` found, where its repository has one."""
        if pipeline not in self._given:
            return
        snapshot, reference = self._given[pipeline]
        classes = (read_json(pipeline / "model_index.json") or {}).get(part)
        listed = isinstance(classes, list) and any(classes)  # [null, null] is one that it lacks

        def choose(names: Collection[str], whole: bool) -> Sequence[str]:
            return select_component(
                names, reference.path, part, where=reference.repository, expected=listed and not whole
            )

        snapshot.fetch(choose)

    def source(self, file: Path, source: Source) -> Source:
        """``source`` with the origin of its ``file``. Raises ``BadCheckpoint`` where that is not what was published."""
        origin = self._origin(file)
        if origin is None:
            return source
        published = file.readlink().name if file.is_symlink() else ""  # of a large file its sha256
        if len(published) == _DIGEST and published != source.sha256:
            raise BadCheckpoint(
                f"{file} is damaged: its sha256 is {source.sha256}, and {published} was published",
                hint=f"remove {file.resolve()} and build again",
            )
        return msgspec.structs.replace(source, origin=origin)

    def _origin(self, file: Path) -> Origin | None:
        inside = [path for path, (snapshot, _) in self._given.items() if file.is_relative_to(snapshot.root)]
        if not inside:
            return None
        near = [path for path in inside if file.is_relative_to(path)] or inside
        snapshot, reference = self._given[max(near, key=lambda path: len(path.parts))]
        return Origin(
            repository=reference.repository,
            revision=reference.revision,
            commit=snapshot.commit,
            path=file.relative_to(snapshot.root).as_posix(),
            given=reference.path,
        )

    def _snapshot(self, reference: Reference) -> Snapshot:
        key = reference.repository, reference.revision
        if key not in self._snapshots:
            self._snapshots[key] = Snapshot(reference, self._report)
        return self._snapshots[key]
