"""What tests on a local Ray have in common."""

from __future__ import annotations

import pytest

__all__ = ["RAY_WARNINGS"]

# Ray warns of its own settings, and leaves files and sockets to the garbage collector.
RAY_WARNINGS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:ray.*",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
