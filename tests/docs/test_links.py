"""Links of all Markdown pages: files are in git, anchors exist by GitHub's rule and by the site's, none is a folder.

Links to other hosts are fetched with ``TSTITCH_TEST_LINKS=1`` only.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import unicodedata
from collections import Counter
from functools import cache
from urllib.parse import urlsplit

import pytest
import yaml

from support.snippets import ROOT, without_blocks

_LINK = re.compile(r"""\]\(([^)\s]+)(?: "[^"]*")?\)|\s(?:src|href)="([^"]+)"|^\[[^\]\n]+\]: (\S+)""", re.MULTILINE)
_MACHINE = re.compile(r"(?<![\w.~])/(?:root|home|Users|work)/\w")


@cache
def tracked() -> frozenset[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return frozenset(listed.splitlines())


def pages() -> list[str]:
    return sorted(path for path in tracked() if path.endswith(".md") and (ROOT / path).exists())


@cache
def prose(page: str) -> str:
    """Without fenced blocks."""
    return without_blocks((ROOT / page).read_text())


def links(page: str) -> list[str]:
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    return [next(filter(None, match.groups())) for match in _LINK.finditer(text)]


def by_site(heading: str) -> str:
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def by_github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: str) -> dict[str, str]:
    """Anchor on the site -> why a link to it works in one place only, or ``""``."""
    text = prose(page)
    headings = [
        re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", found).replace("`", "").replace("*", "")
        for found in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE)
    ]
    seen: Counter[str] = Counter(map(by_site, headings))
    found = {}
    for heading in headings:
        site, host = by_site(heading), by_github(heading)
        found[site] = f"a code host calls it #{host}" if site != host else "two headings have it" * (seen[site] > 1)
    return {**found, **dict.fromkeys(re.findall(r'\s(?:id|name)="([^"]+)"', text), "")}


def has_object(page: str, anchor: str) -> bool:
    """Whether mkdocstrings writes ``anchor`` into the page: an object of a ``:::`` line, or a member of one."""
    named = re.findall(r"^::: (\S+)", (ROOT / page).read_text(), re.MULTILINE)
    return any(anchor == name or anchor.startswith(f"{name}.") for name in named)


@pytest.mark.parametrize("page", pages())
def test_links(page: str) -> None:
    wrong = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            parts = urlsplit(link)
            if parts.scheme == "mailto":
                continue
            if parts.scheme != "https" or "." not in parts.netloc:
                wrong.append(f"{link}: no https address")
            continue
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        if target not in tracked():
            wrong.append(f"{link}: {target} is {'a folder' if (ROOT / target).is_dir() else 'not in git'}")
        elif anchor and target.endswith(".md") and not has_object(target, anchor):
            why = anchors(target).get(anchor, "no heading has this anchor")
            wrong += [f"{link}: {why}"] * bool(why)
    assert not wrong, "\n".join(wrong)


def test_no_path_of_a_machine() -> None:
    assert [page for page in pages() if _MACHINE.search((ROOT / page).read_text())] == []


def test_the_navigation_has_every_page_once() -> None:
    def walk(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [path for value in entry.values() for path in walk(value)]
        return [path for each in entry for path in walk(each)] if isinstance(entry, list) else [str(entry)]

    named = [f"docs/{path}" for path in walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])]
    assert sorted(named) == [page for page in pages() if page.startswith("docs/")]


def test_pages_named_in_sources_exist() -> None:
    sources = [path for path in tracked() if path.endswith((".py", ".c", ".h", ".hpp", ".cpp", ".toml", ".sh", ".yml"))]
    wrong = []
    for path in sources:
        if (ROOT / path).exists() and not path.startswith("tests/"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md\b", (ROOT / path).read_text()):
                wrong += [f"{path}: {page}"] * (page not in tracked())
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not os.environ.get("TSTITCH_TEST_LINKS"), reason="fetches pages: only with TSTITCH_TEST_LINKS=1")
def test_other_hosts_answer() -> None:
    import httpx

    addresses = {link for page in pages() for link in links(page) if link.startswith("https:")}
    with httpx.Client(follow_redirects=True, timeout=30) as client:
        wrong = [link for link in sorted(addresses) if client.get(link).status_code >= 400]
    assert not wrong, "\n".join(wrong)
