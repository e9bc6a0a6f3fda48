"""A hook of MkDocs: files outside docs/ that pages link to are published with the site, under ``repository/``.

A link ``../../examples/ray/serve.yaml`` thus works on a code host and on the site. Markdown files become pages, and the
links in them are followed too. A link to a file that does not exist stays as it is, and the strict build names it. A
folder can't be linked.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

FOLDER = "repository"
_FENCE = re.compile(r"^( *)(`{3,})[^\n]*\n.*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"""(\]\(|\ssrc="|\shref="|^\[[^\]\n]+\]: )([^)\s"#]+)(?=[)\s"#])""", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is linked, and what that links."""
    pending = [file for file in files if file.is_documentation_page()]
    while pending:
        file = pending.pop()
        for path in _outside(file, config):
            src_uri = f"{FOLDER}/{path}"
            if files.get_file_from_path(src_uri) is None:
                found = File.generated(
                    config, src_uri, abs_src_path=str(_root(config) / path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(found)
                if found.is_documentation_page():
                    pending.append(found)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository as links of the site."""

    def to_site(target: str) -> str:
        path = _in_repository(page.file, target)
        src_uri = path.removeprefix("docs/") if path.startswith("docs/") else f"{FOLDER}/{path}"
        if files.get_file_from_path(src_uri) is None:
            return target
        return posixpath.relpath(src_uri, posixpath.dirname(page.file.src_uri) or ".")

    return _replace_links(markdown, to_site)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _in_repository(file: File, target: str) -> str:
    """The path from the repository's root that ``target`` of a page means; starts with ``..`` where it is outside."""
    prefix = f"{FOLDER}/"
    source = file.src_uri.removeprefix(prefix) if file.src_uri.startswith(prefix) else f"docs/{file.src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _outside(file: File, config: MkDocsConfig) -> list[str]:
    found: list[str] = []

    def note(target: str) -> str:
        path = _in_repository(file, target)
        if not path.startswith(("docs/", "..", "/")) and (_root(config) / path).is_file():
            found.append(path)
        return target

    _replace_links(file.content_string, note)
    return found


def _replace_links(markdown: str, new: Callable[[str], str]) -> str:
    """Every relative target outside fenced code blocks."""

    def replace(match: re.Match[str]) -> str:
        target = match[2]
        return match[1] + (target if re.match(r"[a-z]+:|/", target) else new(target))

    parts: list[str] = []
    end = 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(replace, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replace, markdown[end:])])
