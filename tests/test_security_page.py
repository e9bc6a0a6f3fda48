"""SECURITY.md: the tests that each attack names exist, and the limits are those in use."""

from __future__ import annotations

import re
from pathlib import Path

from tstitch_engines.bundle import read
from tstitch_trt.images.read import MOST_BYTES, MOST_PIXELS

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


def test_the_limits_are_those_in_use() -> None:
    page = " ".join(PAGE.split())
    for what, limit in (("manifest", read.MANIFEST_BYTES), ("study", read.STUDY_BYTES), ("recipe", read.RECIPE_BYTES),
                        ("configuration", read.CONFIG_BYTES), ("weight header", read.VOCABULARY_BYTES)):  # fmt: skip
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
        assert f"{what} {size}" in page
    assert f"{read.DEPTH} levels, {read.VALUES:,} values, whole numbers of {read.DIGITS} digits" in page
    assert f"at most {MOST_PIXELS // 10**6} million pixels and {MOST_BYTES >> 20} MiB" in page
