"""Letting go of several things, each of which may fail."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tstitch_engines.errors import first_line

__all__ = ["do_all"]

_log = logging.getLogger(__name__)


def do_all(*steps: Callable[[], object]) -> None:
    """Calls all of them, in this order, and then raises what failed first, or Ctrl-C. Other failures are logged."""
    failed: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:
            if failed is None:
                failed = error
                continue
            first, other = (failed, error) if isinstance(error, Exception) else (error, failed)
            _log.warning("not the only failure: %s", first_line(other))
            failed = first
    if failed is not None:
        raise failed
