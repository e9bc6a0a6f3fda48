"""docs/design/ is true: its order is the one that is checked, folders and files exist, none is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_layers import ORDER

ROOT = Path(__file__).parent.parent
DESIGN = ROOT / "docs" / "design"
PAGE = (DESIGN / "index.md").read_text()
ALL = "\n".join(path.read_text() for path in sorted(DESIGN.glob("*.md")))
FOLDERS = {
    "tstitch_engines": "engines/tstitch_engines",
    "tstitch_export": "export/tstitch_export",
    "tstitch_trt": "tstitch_trt",
}
EXAMPLES = {"tstitch_trt/solvers/ab2.py", "engines/tstitch_engines/backends/onnx_reference.py"}  # to be written there


def rows(package: str) -> list[tuple[int, str]]:
    """(order, name) of a package's table."""
    section = PAGE.split(f"### {FOLDERS[package]}:")[1].split("\n#")[0]
    found = re.findall(r"^\| (\d+) \| `(\w+)` \| .+ \|$", section, re.MULTILINE)
    return [(int(order), name) for order, name in found]


@pytest.mark.parametrize("package", list(ORDER))
def test_the_order_is_the_one_that_is_checked(package: str) -> None:
    lines: dict[int, set[str]] = {}
    for order, name in rows(package):
        lines.setdefault(order, set()).add(name)
    assert [lines[order] for order in sorted(lines)] == [set(line) for line in ORDER[package]]
    assert len(rows(package)) == sum(map(len, ORDER[package]))


@pytest.mark.parametrize("package", list(ORDER))
def test_names_exist_and_none_is_missing(package: str) -> None:
    folder = ROOT / FOLDERS[package]
    there = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert {name for _, name in rows(package)} == there


def test_paths_exist() -> None:
    paths = re.findall(r"`((?:engines|export|tests|tstitch_trt|tstitch_engines|docs)/[\w./-]+)`", ALL)
    assert len(paths) > 40
    assert {path for path in paths if not (ROOT / path).exists()} == EXAMPLES
    blocks = "\n".join(re.findall(r"^    .+$", PAGE, re.MULTILINE))  # paths inside a package
    inside = re.findall(r"\b([a-z_]+/\w+\.py)\b", blocks)
    assert len(inside) > 8
    assert [path for path in inside if not any((ROOT / root / path).exists() for root in FOLDERS.values())] == []


def test_what_it_tells_to_extend_is_there() -> None:
    """A name in capitals or a class, followed by its file in parentheses."""
    found = re.findall(r"`(\w+)`\s+\(`([\w./-]+\.py)`\)", ALL)
    assert len(found) > 12
    for name, path in found:
        assert re.search(rf"^(?:class |def )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), (name, path)
