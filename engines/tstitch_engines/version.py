"""The version of this code, installed or not. ``pyproject.toml`` and ``CITATION.cff`` have the same."""

from __future__ import annotations

from typing import Final

__all__ = ["VERSION"]

VERSION: Final = "0.1.0"
