"""The generated parts of docs/ are what the code says; ``make pages`` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import pytest

import tstitch_trt
from support.pages.write import DOCS, FILES, PARTS, current, pages
from tstitch_engines import errors as tstitch_errors
from tstitch_engines.backends import BACKENDS
from tstitch_export.families import FAMILIES


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_generated_parts_are_current(page: Path) -> None:
    assert page.read_text() == current(page), "run make pages"


@pytest.mark.parametrize("name", FILES)
def test_generated_files_are_current(name: str) -> None:
    assert (DOCS / name).read_text() == FILES[name](), "run make pages"


def test_every_part_is_on_one_page() -> None:
    text = "".join(page.read_text() for page in pages())
    assert {name: text.count(f"<!-- generated: {name} -->") for name in PARTS} == dict.fromkeys(PARTS, 1)


def test_the_schema_of_the_manifest_holds(fashion_bundle: Path) -> None:
    schema = json.loads((DOCS / "reference" / "manifest.schema.json").read_bytes())
    manifest = json.loads((fashion_bundle / "manifest.json").read_bytes())
    jsonschema.validate(manifest, schema)
    for name, value in (("members", {}), ("name", 3), ("unknown", 1)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**manifest, name: value}, schema)


def test_every_public_name_is_on_the_page() -> None:
    text = (DOCS / "reference" / "python.md").read_text()
    errors = {name for name in tstitch_trt.__all__ if name in vars(tstitch_errors)}
    named = set(re.findall(r'heading: "tstitch_trt\.(\w+)"', text))
    assert named == set(tstitch_trt.__all__) - errors - {"__version__"}


@pytest.mark.parametrize(("page", "names"), [("models", FAMILIES), ("backends", BACKENDS)])
def test_every_family_and_backend_has_a_row(page: str, names: Mapping[str, object]) -> None:
    rows = re.findall(r"^\| (.+?) \|", (DOCS / "support" / f"{page}.md").read_text(), re.MULTILINE)
    assert names.keys() <= {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
