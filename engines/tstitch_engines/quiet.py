"""Keeps the chatter of other libraries away from stdout, which belongs to data."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["silence_output"]

_log = logging.getLogger(__name__)
_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "diffusers")


@contextlib.contextmanager
def silence_output() -> Iterator[None]:
    """What Python code prints or warns inside goes to the debug log; errors raised pass through."""
    printed = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    try:
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for line in (*printed.getvalue().splitlines(), *(str(item.message) for item in warned)):
            _log.debug("%s", line)
