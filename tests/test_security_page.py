"""Each attack in SECURITY.md names the tests that hold it: they exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "SECURITY.md").read_text()


def test_the_tests_of_the_table_exist() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and re.search(r"\.(py|c)\b", line)]
    assert len(rows) > 100
    for row in rows:
        named = re.findall(r"`([\w/]+\.(?:py|c))(?:::(\w+))?`", row.rpartition(" | ")[2])
        assert named, row
        for file, test in named:
            assert re.search(rf"\b{test}\b", (TESTS / file).read_text()), f"{file}::{test}"
