"""Ctrl-C while the command line starts: imports have nothing to tidy up, so it ends at once and without a traceback.

Imported before everything else, and itself imports only what Python has loaded already: until this ran, Ctrl-C shows
the traceback of whatever import it fell into.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps, without its enums
import os
import sys

__all__ = ["end_at_once"]


def end_at_once(number: int, frame: object) -> None:
    """A signal's handler."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _is_command() -> bool:
    """Whether this process is ``tstitch-trt`` or ``python -m tstitch_trt.cli``, and not a program that imports us."""
    program = sys.argv[0] if sys.argv else ""
    return os.path.basename(program) == "tstitch-trt" or (  # noqa: PTH119 - pathlib is not loaded
        program == "-m" and "tstitch_trt.cli" in sys.orig_argv
    )


if _is_command() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, end_at_once)
