"""The parts of docs/ that are made from code, and the command that writes them.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``; what is around it is written
by hand. Files of ``FILES`` are generated whole.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from support.pages import cli, documents, errors, options, python, records, schedules

__all__ = ["DOCS", "FILES", "PARTS", "current", "main", "pages"]

DOCS: Final = Path(__file__).parents[3] / "docs"
PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "commands": cli.commands,
    "shared options": cli.shared_options,
    "backend options": options.backend_options,
    "family options": options.family_options,
    "error tree": errors.tree,
    "errors": errors.classes,
    "HTTP statuses": errors.statuses,
    "json commands": documents.commands,
    "json documents": documents.documents,
    "image keywords": python.image_keywords,
    "step keywords": python.step_keywords,
    "recipes": records.recipes,
    "recipe template": records.recipe_template,
    "recipe": records.recipe,
    "manifest": records.manifest,
    "rounding": schedules.rounding,
    "solvers": schedules.solvers,
    "solver options": schedules.solver_options,
}
FILES: Final[Mapping[str, Callable[[], str]]] = {
    "reference/manifest.schema.json": records.manifest_schema,
    "reference/output.schema.json": documents.output_schema,
}
_PART = re.compile(r"(<!-- generated: (?P<name>[\w ]+) -->\n).*?(<!-- end of (?P=name) -->)", re.DOTALL)


def pages() -> list[Path]:
    """Pages with generated parts."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _PART.search(page.read_text())]


def current(page: Path) -> str:
    """The page as the code has it now."""
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part['name']]().strip()}\n\n{part[3]}", page.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(prog="make pages", description="Writes the generated parts of docs/.")
    parser.add_argument("--quick", action="store_true", help="all but support/compatibility.md, which takes 20 seconds")
    quick = parser.parse_args().quick
    for page in pages():
        page.write_text(current(page))
    for name, make in FILES.items():
        (DOCS / name).write_text(make())
    if not quick:
        from support.compatibility import page as compatibility

        compatibility.PAGE.write_text(compatibility.page())
    return 0
