"""Keeps the chatter of other libraries away from stdout, which belongs to data."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Final

__all__ = ["silence_output"]

_log = logging.getLogger(__name__)
_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "diffusers")
_STREAMS: Final = {"stdout": contextlib.redirect_stdout, "stderr": contextlib.redirect_stderr}


class _Silence:
    """stdout, warnings and levels of loggers belong to the process: the first block that begins takes them, and the
    last one that ends gives them back. Each on its own would restore what another block had put there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._taken = contextlib.ExitStack()
        self._printed = io.StringIO()
        self._warned: list[warnings.WarningMessage] = []
        self._streams: set[str] = set()

    def begin(self, **streams: bool) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._printed = io.StringIO()
                self._warned = self._taken.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                for logger in map(logging.getLogger, _CHATTY):
                    self._taken.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL)
            for name, redirect in _STREAMS.items():
                if streams[name] and name not in self._streams:
                    self._streams.add(name)
                    self._taken.enter_context(redirect(self._printed))

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            self._taken.close()
            self._streams.clear()
            lines = (*self._printed.getvalue().splitlines(), *(str(item.message) for item in self._warned))
        for line in lines:
            _log.debug("%s", line)


_SILENCE: Final = _Silence()


@contextlib.contextmanager
def silence_output(*, stdout: bool = True, stderr: bool = False) -> Iterator[None]:
    """What Python code warns of inside goes to the debug log, and what it writes to these streams.

    What other threads print meanwhile goes there too.
    """
    _SILENCE.begin(stdout=stdout, stderr=stderr)
    try:
        yield
    finally:
        _SILENCE.end()
