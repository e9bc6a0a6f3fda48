"""README.md is short, and every page is near. Its snippets run in tests/docs/test_snippets.py."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from support.snippets import blocks

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def linked(page: str) -> set[str]:
    """The pages of the repository that ``page`` links to."""
    found = re.findall(r"\]\(([^)#\s:]+\.md)(?:#[\w-]+)?\)", (ROOT / page).read_text())
    return {posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) for path in found}


def test_it_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    (python,) = (block for block in blocks(README) if block.language == "python")
    install, tests, commands = (block for block in blocks(README) if block.language == "sh")
    assert len(python.text.strip().splitlines()) <= 10
    assert len(commands.text.strip().splitlines()) <= 10
    assert install.text == 'pip install ".[cpu]" && tstitch-trt demo\n'
    assert tests.text == 'pip install ".[test]" && pytest -n auto\n'
    assert f"<!-- test-command -->\n```sh\n{tests.text}```\n" in README.read_text()  # .ci/run reads it


def test_every_page_is_two_clicks_away() -> None:
    first = linked("README.md")
    reached = first | {page for near in first for page in linked(near)}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - reached == set()
