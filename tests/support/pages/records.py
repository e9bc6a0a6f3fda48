"""docs/reference/recipe.md and manifest.md: each ``msgspec`` record as a section with a table of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
from msgspec import inspect as types

from support.compatibility.markdown import code, codes, table
from support.pages.words import as_markdown
from tstitch_engines.bundle.manifest import Manifest
from tstitch_export.planning.recipe import Recipe, load_recipe, recipe_names, template

__all__ = ["manifest", "manifest_schema", "recipe", "recipe_template", "recipes"]


def recipe() -> str:
    return _sections(Recipe)


def recipe_template() -> str:
    return f"```toml\n{template().strip()}\n```"


def recipes() -> str:
    rows = []
    for name in recipe_names():
        found, _ = load_recipe(name)
        members = ", ".join(f"{code(member)} ({code(of.family)})" for member, of in found.members.items()) + (
            ", and others" if found.other_members else ""
        )
        rows.append([code(name), found.description, members, codes(found.parts), code(found.defaults.schedule)])
    return table(("recipe", "what it is", "members (family)", "parts", "default schedule"), rows)


def manifest() -> str:
    return _sections(Manifest)


def manifest_schema() -> str:
    """JSON Schema, its patterns with the anchors of JavaScript."""
    text = json.dumps(msgspec.json.schema(Manifest), indent=2).replace(r'"\\A', '"^').replace(r'\\Z"', '$"')
    return text + "\n"


def _sections(root: type[msgspec.Struct]) -> str:
    """``root`` and every record inside it, in the order in which they appear."""
    kinds = {root: None}
    pending = [root]
    while pending:
        for kind in _inside(types.type_info(pending.pop(0))):
            if kind not in kinds:
                kinds[kind] = None
                pending.append(kind)
    return "\n\n".join(_section(kind) for kind in kinds)


def _section(kind: type[msgspec.Struct]) -> str:
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)
    rows = [
        [code(field.encode_name), _type(field.type), "required" if field.required else _default(field)]
        for field in info.fields
    ]
    text = as_markdown(kind.__dict__["__doc__"])
    return "\n\n".join([f"### {kind.__name__}", text, table(("field", "type", "default"), rows)])


def _inside(info: types.Type) -> Iterator[type[msgspec.Struct]]:
    if isinstance(info, types.StructType):
        for field in info.fields:
            yield from _direct(field.type)


def _direct(info: types.Type) -> Iterator[type[msgspec.Struct]]:
    match info:
        case types.StructType():
            yield info.cls
        case types.UnionType():
            for each in info.types:
                yield from _direct(each)
        case types.Metadata():
            yield from _direct(info.type)
        case types.DictType():
            yield from _direct(info.value_type)
        case types.VarTupleType():
            yield from _direct(info.item_type)
        case types.TupleType():
            for each in info.item_types:
                yield from _direct(each)


def _type(info: types.Type) -> str:
    match info:
        case types.Metadata():
            described = (info.extra_json_schema or {}).get("description")
            return f"{_type(info.type)}: {described}" if described and "signs" not in described else _type(info.type)
        case types.StructType():
            return f"[{info.cls.__name__}](#{info.cls.__name__.lower()})"
        case types.UnionType():
            skipped: tuple[type, ...] = (types.NoneType,)
            if any(isinstance(each, types.FloatType) for each in info.types):
                skipped = (types.NoneType, types.IntType)
            names = [_type(each) for each in info.types if not isinstance(each, skipped)]
            return " or ".join(dict.fromkeys(names))
        case types.DictType():
            return f"table: name → {_type(info.value_type)}"
        case types.VarTupleType():
            return f"list of {_type(info.item_type)}"
        case types.TupleType():
            return f"{len(info.item_types)} of {_type(info.item_types[0])}"
        case types.LiteralType():
            return ", ".join(code(value) for value in info.values)
        case types.EnumType():
            return ", ".join(code(value.value) for value in info.cls)
        case types.IntType() | types.FloatType():
            return ("whole number" if isinstance(info, types.IntType) else "number") + _bounds(info)
        case types.StrType():
            return "text"
        case types.BoolType():
            return "`true`, `false`"
    raise AssertionError(info)


def _bounds(info: types.IntType | types.FloatType) -> str:
    low = info.ge if info.ge is not None else info.gt
    high = info.le if info.le is not None else info.lt
    if low is None or (low < 0 and high == -low):
        return ""
    above = "above " if info.ge is None else ""
    below = "below " if info.le is None else ""
    if high is None or high >= 1_000_000_000:
        return f", {above}{low:,}{'' if above else ' or more'}"
    return f", {above}{low:,} to {below}{high:,}".replace(".0", "")


def _default(field: types.Field) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return "empty"
    if field.default in (None, msgspec.UNSET, msgspec.NODEFAULT):
        return "none"
    if field.default in ((), {}):
        return "empty"
    return code(json.dumps(field.default))
