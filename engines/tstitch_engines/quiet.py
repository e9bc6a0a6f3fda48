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


class _Silence:
    """stdout, warnings and levels of loggers belong to the process: the first block that begins takes them, and the
    last one that ends gives them back. Each on its own would restore what another block had put there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._taken = contextlib.ExitStack()
        self._printed = io.StringIO()
        self._warned: list[warnings.WarningMessage] = []
        self._stderr = False

    def begin(self, *, stderr: bool) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._printed = io.StringIO()
                self._warned = self._taken.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                self._taken.enter_context(contextlib.redirect_stdout(self._printed))
                for logger in map(logging.getLogger, _CHATTY):
                    self._taken.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL)
            if stderr and not self._stderr:
                self._stderr = True
                self._taken.enter_context(contextlib.redirect_stderr(self._printed))

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            self._taken.close()
            self._stderr = False
            lines = (*self._printed.getvalue().splitlines(), *(str(item.message) for item in self._warned))
        for line in lines:
            _log.debug("%s", line)


_SILENCE: Final = _Silence()


@contextlib.contextmanager
def silence_output(*, stderr: bool = False) -> Iterator[None]:
    """What Python code prints or warns inside goes to the debug log, with ``stderr`` also what it writes there.

    What other threads print meanwhile goes there too.
    """
    _SILENCE.begin(stderr=stderr)
    try:
        yield
    finally:
        _SILENCE.end()
