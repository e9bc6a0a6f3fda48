"""docs/support/compatibility.md, asked of the code that decides. ``make pages`` writes it."""
