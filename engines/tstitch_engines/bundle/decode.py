"""Typed decoding of JSON and TOML data in which an unknown field is an error that names the nearest known one."""

from __future__ import annotations

from typing import Any, TypeVar

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


def convert(data: Any, kind: type[T], *, word: str) -> T:
    """``data`` (dicts, lists, scalars) as a ``kind``. Raises ``DecodeError``; ``word`` is ``"field"`` or ``"key"``."""
    _refuse_unknown(data, inspect.type_info(kind), "", word)
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


def _refuse_unknown(data: Any, kind: inspect.Type, place: str, word: str) -> None:
    """Walks data and type side by side: msgspec alone would say what is unknown but not what was meant."""
    if isinstance(kind, inspect.UnionType):
        for part in kind.types:
            if isinstance(part, (inspect.StructType, inspect.DictType, inspect.VarTupleType)):
                _refuse_unknown(data, part, place, word)
    elif isinstance(kind, inspect.StructType) and isinstance(data, dict):
        known = {field.encode_name: field.type for field in kind.fields}
        for name, value in data.items():
            if name not in known:
                close = nearest(str(name), known)
                raise DecodeError(
                    f"unknown {word} {place + str(name)!r}; known here: {', '.join(known)}",
                    f"did you mean {close!r}?" if close else f"remove it, or use one of: {', '.join(known)}",
                )
            _refuse_unknown(value, known[name], f"{place}{name}.", word)
    elif isinstance(kind, inspect.DictType) and isinstance(data, dict):
        for name, value in data.items():
            _refuse_unknown(value, kind.value_type, f"{place}{name}.", word)
    elif isinstance(kind, inspect.VarTupleType) and isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            _refuse_unknown(value, kind.item_type, f"{place}{index}.", word)
