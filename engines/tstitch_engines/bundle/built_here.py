"""Which engines this machine compiled: an empty file each, named by the hash of the engine's files.

They lie beside the component cache and not in it: an engine stays known when its entry is pruned.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tstitch_engines.bundle.cache import default_root
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Component

__all__ = ["is_built_here", "note_built"]

_log = logging.getLogger(__name__)


def note_built(files: Sequence[Component]) -> None:
    """Notes that this machine compiled the engine with these files."""
    mark = _mark(files)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        _log.warning("%s can't be written (%s): loading the engine again will want --trust", mark, error.strerror)


def is_built_here(files: Sequence[Component]) -> bool:
    """Whether this machine compiled them. Their hashes are believed: the caller has checked the files."""
    return _mark(files).is_file()


def _mark(files: Sequence[Component]) -> Path:
    """Of names and hashes, hashed once more: what a manifest calls a hash may be any text."""
    name = digest([(part.path.rpartition("/")[2], part.sha256) for part in files])
    return default_root() / "built" / name[:2] / name
