"""Features of drawn pictures on disk, batch by batch, so that an interrupted study can go on.

One folder per setting (and seed, weights and engines), one ``.npz`` per batch. An incomplete batch is drawn again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.read import RECORD_BYTES, read_json
from tstitch_engines.errors import FailedWork
from tstitch_trt.files import atomic_file, open_arrays, write_text

__all__ = ["Observations"]

_log = logging.getLogger(__name__)


class Observations:
    """Those of one setting. ``sources``: the names of the features, each with a digest of what it was made from."""

    def __init__(self, folder: Path, sources: Mapping[str, str]) -> None:
        self._folder = folder
        self._keys = {name: f"{name}.{source[:16]}" for name, source in sources.items()}

    def missing(self, start: int, count: int) -> list[str]:
        """The features that are not stored of the batch of ``count`` pictures that begins with picture ``start``."""
        stored = self._read(start)
        return [name for name, key in self._keys.items() if len(stored.get(key, ())) < count]

    def add(self, start: int, features: Mapping[str, NDArray[Any]]) -> None:
        """Raises ``FailedWork`` where it can't be written."""
        stored = self._read(start) | {self._keys[name]: array for name, array in features.items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path(start)) as file:
                np.savez(file, **stored)  # type: ignore[arg-type]
        except OSError as error:
            raise FailedWork(
                f"{self._path(start)} can't be written: {error}", hint="keep unfinished work elsewhere: --work DIR"
            ) from error

    def load(self, start: int, count: int) -> dict[str, NDArray[Any]]:
        """All features of a batch."""
        stored = self._read(start)
        return {name: stored[key][:count] for name, key in self._keys.items()}

    def times(self) -> list[float]:
        """Milliseconds of the timed rounds so far."""
        try:
            return msgspec.convert(read_json(self._folder / "times.json", RECORD_BYTES), list[float])
        except (OSError, ValueError):
            return []

    def add_time(self, ms: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / "times.json", json.dumps([*self.times(), ms]))

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:07d}.npz"

    def _read(self, start: int) -> dict[str, NDArray[Any]]:
        path = self._path(start)
        if not path.is_file():
            return {}
        try:
            with open_arrays(path) as stored:
                return {name: stored.read(name) for name in stored.names}
        except (OSError, ValueError) as error:
            _log.warning("%s is damaged and is drawn again: %s", path, error)
            return {}
