"""The one type of a progress callback."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, float], None]
"""Gets the phase, as text for people, and the share of the whole work that is done, 0 to 1."""


def silent(phase: str, share: float) -> None:
    """Shows nothing."""
