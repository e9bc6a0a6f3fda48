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
def silence_output(*, stderr: bool = False) -> Iterator[None]:
    """What Python code prints or warns inside goes to the debug log, with ``stderr`` also what it writes there."""
    printed = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    try:
        with contextlib.ExitStack() as stack:
            warned = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            stack.enter_context(contextlib.redirect_stdout(printed))
            if stderr:
                stack.enter_context(contextlib.redirect_stderr(printed))
            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for line in (*printed.getvalue().splitlines(), *(str(item.message) for item in warned)):
            _log.debug("%s", line)
