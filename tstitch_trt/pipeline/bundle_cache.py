"""The bundles that ``tstitch_trt.accelerate`` made and keeps beside the component cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from tstitch_engines.bundle.bundle import MANIFEST
from tstitch_engines.bundle.cache import Stored, default_root, prune_stored
from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.files import remove_stale, temporary_directory
from tstitch_engines.bundle.manifest import Component
from tstitch_engines.bundle.read import MANIFEST_BYTES, read_json

__all__ = ["kept_bundles", "kept_root", "prune_kept", "touch"]

_ENDING: Final = ".bundle"
_STAGING: Final = "removing-"


def kept_root() -> Path:
    return default_root() / "pipelines"


def touch(bundle: Path) -> None:
    """Notes that it was used now, which is what pruning goes by."""
    with suppress(OSError):  # a cache that may only be read
        os.utime(bundle / MANIFEST)


def kept_bundles() -> list[Stored]:
    """All of them, the one used last first, as the component cache lists its entries."""
    found = [Stored(path.stem, used, _files(path), {"what": _what(path)}) for path, used in _bundles()]
    return sorted(found, key=lambda entry: (-entry.used, entry.key))


def prune_kept(*, max_bytes: int | None = None, older_than: float | None = None) -> list[Stored]:
    """Like ``Cache.prune``: what was not used for ``older_than`` seconds, and what does not fit; with neither all."""
    root = kept_root()
    remove_stale(root, _STAGING)

    def remove(entry: Stored) -> bool:
        with temporary_directory(root, _STAGING) as aside:
            (root / f"{entry.key}{_ENDING}").rename(aside / entry.key)
        return True

    return prune_stored(kept_bundles(), remove, max_bytes=max_bytes, older_than=older_than)


def _bundles() -> Iterator[tuple[Path, float]]:
    for path in kept_root().glob(f"*{_ENDING}"):
        with suppress(OSError):  # not whole, or gone meanwhile
            yield path, (path / MANIFEST).stat().st_mtime


def _files(path: Path) -> tuple[Component, ...]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return tuple(Component(path=str(f.relative_to(path)), sha256="", bytes=f.stat().st_size) for f in files)


def _what(path: Path) -> str:
    with suppress(OSError, DecodeError, KeyError, TypeError):
        return f"accelerated pipeline: {read_json(path / MANIFEST, MANIFEST_BYTES)['name']} bundle"
    return "accelerated pipeline: damaged bundle"
