"""Texts of docstrings and of the command's help as Markdown."""

from __future__ import annotations

import inspect
import re

__all__ = ["as_markdown"]


def as_markdown(text: str) -> str:
    """Double backquotes as single ones; ``<`` escaped outside of code."""
    text = inspect.cleandoc(text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)
