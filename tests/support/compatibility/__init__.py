"""docs/compatibility.md, made by asking the code that decides. ``python -m support.compatibility`` writes it."""
