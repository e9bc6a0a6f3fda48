"""The documentation site builds without a warning, holds what its pages link to, and loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason='the site needs pip install ".[docs]"')

ROOT = Path(__file__).parents[2]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_request_nothing_from_other_hosts(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 40
    foreign = re.compile(r'<(?:script|link|img|iframe|source|video|object)\b[^>]*?\b(?:src|href|data)="?(?:https?:)?//')
    assert [page.name for page in pages if foreign.search(page.read_text())] == []
    styles = [*site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"(?:url\(|@import )['\"]?(?:https?:)?//", style.read_text()) for style in styles)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository with one page beside the hook and files outside docs/."""
    (tmp_path / "docs" / "hooks").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "hooks" / "repository_files.py", tmp_path / "docs" / "hooks")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "README.md").write_text("# Examples\n\n[one](one.yaml), [home](../docs/index.md#home)\n")
    (tmp_path / "examples" / "one.yaml").write_text("a: 1\n")
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: small\nhooks: [docs/hooks/repository_files.py]\nexclude_docs: /hooks/\nuse_directory_urls: false\n"
        "validation: {links: {not_found: warn, anchors: warn, unrecognized_links: warn}}\n"
    )
    return tmp_path


def test_files_outside_the_folder_are_published_and_what_they_link(small: Path) -> None:
    page = "# Home\n\n[examples](../examples/README.md#examples)\n\n```text\n[x](../examples/README.md)\n```\n"
    (small / "docs" / "index.md").write_text(page)
    done = build(small / "mkdocs.yml", small / "site")
    assert done.returncode == 0, done.stderr
    assert 'href="repository/examples/index.html#examples"' in (small / "site" / "index.html").read_text()
    assert "[x](../examples/README.md)" in (small / "site" / "index.html").read_text()
    published = (small / "site" / "repository" / "examples" / "index.html").read_text()
    assert 'href="one.yaml"' in published
    assert 'href="../../index.html#home"' in published
    assert (small / "site" / "repository" / "examples" / "one.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize("target", ["../examples/two.yaml", "../examples", "../examples/README.md#none"])
def test_what_does_not_exist_or_is_a_folder_fails_the_build(small: Path, target: str) -> None:
    (small / "docs" / "index.md").write_text(f"# Home\n\n[missing]({target})\n")
    done = build(small / "mkdocs.yml", small / "site")
    assert done.returncode == 1
    assert target.partition("#")[2] or target in done.stderr
