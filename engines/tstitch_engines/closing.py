"""Letting go of several things, each of which may fail."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tstitch_engines.errors import first_line

__all__ = ["do_all"]

_log = logging.getLogger(__name__)


def do_all(*steps: Callable[[], object]) -> None:
    """Calls all of them, in this order, and then raises what failed first. Further failures are logged."""
    failed: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:
            if failed is not None:
                _log.warning("after a failure another: %s", first_line(error))
            failed = failed or error
    if failed is not None:
        raise failed
