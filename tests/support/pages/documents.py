"""docs/reference/json.md: the documents that commands print, each record as a section with a table of its fields."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from support.compatibility.markdown import code, table
from support.pages.words import as_markdown
from tstitch_engines.bundle.manifest import Manifest
from tstitch_trt.cli._documents import json_schema

__all__ = ["commands", "documents", "output_schema"]

_WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "null": "`null`",
}
_MANIFEST = msgspec.json.schema(Manifest)["$defs"]  # has a page of its own


def output_schema() -> str:
    """JSON Schema of all documents, its patterns with the anchors of JavaScript."""
    return json.dumps(json_schema(), indent=1).replace(r'"\\A', '"^').replace(r'\\Z"', '$"') + "\n"


def commands() -> str:
    """Each command with the record that it prints."""
    rows = [(code(f"tstitch-trt {name}"), _kind(schema)) for name, schema in json_schema()["documents"].items()]
    return table(("command", "document"), rows)


def documents() -> str:
    """All records but those of the manifest."""
    records = json_schema()["$defs"]
    return "\n\n".join(_section(name, record) for name, record in records.items() if name not in _MANIFEST)


def _section(name: str, record: dict[str, Any]) -> str:
    fields, required = record["properties"], record.get("required", [])
    bases = [base for base in _MANIFEST if set(_MANIFEST[base].get("properties", "?")) <= set(fields)]
    base = max(bases, key=lambda base: len(_MANIFEST[base]["properties"]), default=None)
    said = f"All fields of {_link(base)}, and those below." if base is not None else ""
    inherited = _MANIFEST[base]["properties"] if base is not None else {}
    rows = [
        (code(field), _kind(schema), "" if field in required else "may be absent")
        for field, schema in fields.items()
        if inherited.get(field) != schema
    ]
    described = as_markdown(record.get("description", ""))
    return "\n\n".join(filter(None, [f"### {_title(name)}", described, said, table(("field", "type", ""), rows)]))


def _title(name: str) -> str:
    """``Point (demo)`` for one of two records of the same name."""
    module, _, last = name.rpartition(".")
    return f"{last} ({module.rpartition('.')[2]})" if module else last


def _link(name: str) -> str:
    if name == "Manifest":  # the page's own title
        return "[Manifest](manifest.md)"
    anchor = _title(name).lower().replace(" ", "-").replace("(", "").replace(")", "")
    return f"[{_title(name)}]({'manifest.md' if name in _MANIFEST else ''}#{anchor})"


def _kind(schema: dict[str, Any]) -> str:
    match schema:
        case {"$ref": reference}:
            return _link(reference.removeprefix("#/$defs/"))
        case {"anyOf": kinds}:
            return " or ".join(dict.fromkeys(map(_kind, kinds)))
        case {"enum": values}:
            return ", ".join(map(code, values))
        case {"prefixItems": kinds}:
            return f"{len(kinds)} of {_kind(kinds[0])}"
        case {"type": "array"}:
            return f"list of {_kind(schema.get('items', {}))}"
        case {"type": "object"}:
            return f"object: name → {_kind(schema.get('additionalProperties') or {})}"
        case {"type": kind}:
            return _WORDS[kind]
    return "anything"
