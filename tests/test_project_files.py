"""CHANGELOG.md and CITATION.cff agree with pyproject.toml and with the format's rules."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_changelog_has_this_version_first() -> None:
    headings = re.findall(r"^## (\S+) - (\d{4}-\d\d-\d\d|not released yet)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings
    assert headings[0][0] == PROJECT["version"]
    assert "not released yet" not in [state for _, state in headings[1:]]


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # those that CFF 1.2 wants
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert "arXiv:2402.14167" in [each["value"] for each in paper["identifiers"]]
    assert {frozenset(author) for author in paper["authors"]} == {frozenset({"given-names", "family-names"})}
