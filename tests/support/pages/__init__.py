"""Generated parts of the documentation: ``make pages`` writes them, tests/docs/test_pages.py keeps them current."""
