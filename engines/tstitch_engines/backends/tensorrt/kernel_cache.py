"""TensorRT-RTX's cache of the kernels it compiles for this GPU when an engine is loaded, kept in a file.

Not run on a GPU. The library refuses a cache of another version, GPU or driver; the file name only keeps them apart.
"""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from tstitch_engines.bundle.cache import default_root
from tstitch_engines.bundle.files import replace_file
from tstitch_engines.bundle.identity import digest

if TYPE_CHECKING:
    from tstitch_engines.backends.tensorrt.api import RuntimeCache
    from tstitch_engines.bundle.manifest import EngineIdentity

__all__ = ["KernelCache", "cache_path"]

_log = logging.getLogger(__name__)


def cache_path(identity: EngineIdentity, *, version: str, gpu: str, driver: str) -> Path:
    """The file for one engine, library version, GPU model, driver and operating system, in the user's cache."""
    key = digest(
        {
            "engine": digest(identity),
            "version": version,
            "gpu": gpu,
            "driver": driver,
            "system": f"{platform.system()}-{platform.machine()}",
        }
    )
    return default_root() / "rtx-kernels" / f"{key}.bin"


class KernelCache:
    """Fills the library's cache from the file, and the file from the cache. No trouble with the file is an error."""

    def __init__(self, cache: RuntimeCache, path: Path) -> None:
        self._cache = cache
        self._path = path
        self._stored = b""
        try:
            blob = path.read_bytes()
        except OSError:
            return
        if blob and cache.deserialize(blob):
            self._stored = blob
        else:
            _log.info("%s does not fit this GPU, driver or version: kernels are compiled again", path)

    def save(self) -> None:
        """Writes the file when the cache has changed. Call it after the first run of a context, not while recording.

        A reader sees one whole cache. Of two processes that save the last one's kernels stay, and the next load
        compiles what is missing.
        """
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memoryview(memory))
        if blob and blob != self._stored:
            try:
                replace_file(self._path, blob)
                self._stored = blob
            except OSError as error:
                _log.warning("the kernel cache %s can't be written: %s", self._path, error)
