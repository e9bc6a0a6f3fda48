"""Bundles that changed on disk take over from those that are served."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tstitch_engines.bundle.read import read_bounded
from tstitch_engines.errors import Busy, Closed, FailedWork, TStitchError

if TYPE_CHECKING:
    from tstitch_trt.serve.engine import Engine

__all__ = ["Reloader"]

_log = logging.getLogger(__name__)
_MOST_BYTES: Final = 8 << 20  # of a manifest


class Reloader:
    """``bundles``: where each model of the engine was loaded from. A bundle has changed when its manifest has, which
    states the hash of every file."""

    def __init__(self, engine: Engine, bundles: Mapping[str, Path]) -> None:
        self._engine = engine
        self._bundles = dict(bundles)
        self._served = {model: _manifest(path) for model, path in bundles.items()}
        self._lock = threading.Lock()
        self._waiting = threading.Lock()  # held by the one call that waits for a reload to end

    def __call__(self, *, wait: bool = False) -> tuple[str, ...]:
        """Loads each changed bundle beside the old one, which it replaces between requests. Returns their models.

        One that can't be loaded leaves the old one serving, and the others are tried. Raises ``FailedWork`` that says
        what could not be loaded and what was replaced, and ``Closed`` once the engine drains.

        While another reload is running, this raises ``Busy``, or with ``wait`` follows it. At most one waits: further
        calls return at once, since that one will see their changes too.
        """
        if wait:
            if not self._waiting.acquire(blocking=False):
                return ()
            try:
                self._lock.acquire()
            finally:
                self._waiting.release()
        elif not self._lock.acquire(blocking=False):
            raise Busy("bundles are being reloaded already", hint="wait until that is done")
        try:
            return self._reload()
        finally:
            self._lock.release()

    def _reload(self) -> tuple[str, ...]:
        replaced: list[str] = []
        failed: list[str] = []
        for model, path in self._bundles.items():
            try:
                found = _manifest(path)
                if found == self._served[model]:
                    continue
                _log.info("loading %s again", model)
                self._engine.replace(model, path)
            except Closed:
                raise
            except (TStitchError, OSError, ValueError) as error:
                _log.error("%s could not be loaded again, and is served as it was", model, exc_info=error)
                reason = error.message if isinstance(error, TStitchError) else str(error)
                failed.append(f"{model}: {reason.replace(str(path), path.name)}")
            else:
                self._served[model] = found
                replaced.append(model)
                _give_back_memory()
                _log.info("%s was replaced", model)
        if failed:
            done = f"; replaced: {', '.join(replaced)}" if replaced else ""
            raise FailedWork(
                f"could not be loaded, and is served as it was: {'; '.join(failed)}{done}",
                hint="mend the bundle (tstitch-trt verify BUNDLE) and reload again",
            )
        if not replaced:
            _log.info("no bundle has changed")
        return tuple(replaced)


def _give_back_memory() -> None:
    """What was freed goes back to the system, where the C library (glibc) would keep it for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _manifest(path: Path) -> bytes:
    return sha256(read_bounded(path / "manifest.json", _MOST_BYTES)).digest()
