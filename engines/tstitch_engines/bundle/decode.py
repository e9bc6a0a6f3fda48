"""Typed decoding of JSON and TOML data in which an unknown field is an error that names the nearest known one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from tstitch_engines.errors import TStitchError, nearest

__all__ = ["DecodeError", "convert"]

T = TypeVar("T")


class DecodeError(ValueError):
    """What is wrong with the data and how to mend it, for the caller to put into an error of its own kind."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


_type_info = cache(inspect.type_info)


def convert(data: Any, kind: type[T], *, word: str) -> T:
    """``data`` (dicts, lists, scalars) as a ``kind``. Raises ``DecodeError``; ``word`` is ``"field"`` or ``"key"``."""
    _check(data, _type_info(kind), "", word)  # type: ignore[arg-type]  # a type has a hash
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        place = text.rpartition(" - at `$.")[2].rstrip("`") if " - at `$." in text else ""
        problem = text.partition(" - at ")[0]
        where = f"{word} {place!r}: " if place else ""
        raise DecodeError(f"{where}{problem[0].lower()}{problem[1:]}", "") from None
    except TStitchError as error:  # a record's own check of its values
        raise DecodeError(error.message, error.hint) from None


def _check(data: Any, kind: inspect.Type, place: str, word: str) -> None:
    """Walks data and type side by side: msgspec alone would say what is wrong but not the value, nor what was meant."""
    described = ""
    if isinstance(kind, inspect.Metadata):  # a type with a description
        described, kind = (kind.extra_json_schema or {}).get("description", ""), kind.type
    if isinstance(kind, inspect.UnionType):
        for part in kind.types:
            plain = type(part.type if isinstance(part, inspect.Metadata) else part)
            if isinstance(data, _PYTHON.get(plain, ())) and not (
                isinstance(data, bool) and plain is not inspect.BoolType
            ):
                _check(data, part, place, word)
                return
    elif isinstance(kind, inspect.StructType) and isinstance(data, dict):
        known = {field.encode_name: field.type for field in kind.fields}
        for name, value in data.items():
            if name in known:
                _check(value, known[name], f"{place}{name}.", word)
            elif kind.cls.__struct_config__.forbid_unknown_fields:
                close = nearest(str(name)[:100], known)
                raise DecodeError(
                    f"unknown {word} {_shown(place + str(name))}; known here: {', '.join(known)}",
                    f"did you mean {close!r}?" if close else f"remove it, or use one of: {', '.join(known)}",
                )
    elif isinstance(kind, inspect.DictType) and isinstance(data, dict):
        _check_length(data, kind, place, word)
        for name, value in data.items():
            _check(name, kind.key_type, f"a name in {place}" if place else "a name.", word)
            _check(value, kind.value_type, f"{place}{name}.", word)
    elif isinstance(kind, inspect.VarTupleType | inspect.ListType) and isinstance(data, (list, tuple)):
        _check_length(data, kind, place, word)
        for index, value in enumerate(data):
            _check(value, kind.item_type, f"{place}{index}.", word)
    elif isinstance(kind, inspect.TupleType) and isinstance(data, (list, tuple)):
        for index, (value, item) in enumerate(zip(data, kind.item_types, strict=False)):
            _check(value, item, f"{place}{index}.", word)
    elif isinstance(kind, inspect.IntType | inspect.FloatType) and isinstance(data, int | float):
        _check_number(data, kind, place, word)
    elif isinstance(kind, inspect.LiteralType) and isinstance(data, str | int) and data not in kind.values:
        allowed = ", ".join(map(str, kind.values))
        raise DecodeError(f"{word} {place[:-1]!r}: invalid enum value {_shown(data)}; allowed are {allowed}", "")
    elif isinstance(kind, inspect.StrType) and isinstance(data, str):
        if kind.pattern is not None and re.search(kind.pattern, data) is None:
            raise DecodeError(f"{word} {place[:-1]!r} is {_shown(data)}; allowed is {described or kind.pattern}", "")
        _check_length(data, kind, place, word)


_PYTHON: Final[Mapping[type[inspect.Type], type | tuple[type, ...]]] = {
    inspect.BoolType: bool,
    inspect.IntType: int,
    inspect.FloatType: (int, float),
    inspect.StrType: str,
    inspect.LiteralType: (str, int),
    inspect.StructType: dict,
    inspect.DictType: dict,
    inspect.VarTupleType: (list, tuple),
    inspect.ListType: (list, tuple),
    inspect.TupleType: (list, tuple),
}


def _check_number(number: float, kind: inspect.IntType | inspect.FloatType, place: str, word: str) -> None:
    low, high = (kind.ge if kind.ge is not None else kind.gt), (kind.le if kind.le is not None else kind.lt)
    if (
        (kind.ge is not None and not number >= kind.ge)
        or (kind.gt is not None and not number > kind.gt)
        or (kind.le is not None and not number <= kind.le)
        or (kind.lt is not None and not number < kind.lt)
        or not -_LARGEST <= number <= _LARGEST
    ):
        bounds = [f"{'from' if kind.ge is not None else 'above'} {low}"] if low is not None else []
        bounds += [f"{'to' if kind.le is not None else 'below'} {high}"] if high is not None else []
        raise DecodeError(
            f"{word} {place[:-1]!r} is {_shown(number)}; allowed is {' '.join(bounds) or 'a finite number'}", ""
        )


_LARGEST: Final = 1.7e308


def _check_length(
    data: Any,
    kind: inspect.DictType | inspect.VarTupleType | inspect.ListType | inspect.StrType,
    place: str,
    word: str,
) -> None:
    low, high = kind.min_length or 0, kind.max_length
    if len(data) < low or (high is not None and len(data) > high):
        what = "letters" if isinstance(data, str) else "entries"
        most = "any number" if high is None else high
        raise DecodeError(f"{word} {place[:-1]!r} has {len(data):,} {what}; allowed are {low} to {most}", "")


def _shown(value: Any) -> str:
    """A value in a message, short whatever it is."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
