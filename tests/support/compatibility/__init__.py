"""docs/support/compatibility.md, asked of the code that decides. ``python -m support.compatibility`` writes it."""
