"""Options by name with a declared type: the backend's own, and ``MEMBER.NAME`` for a member's family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tstitch_engines.errors import BadInput, nearest, unknown_name
from tstitch_export.families.base import Scalar

__all__ = ["split_options", "typed"]

Known = Mapping[str, tuple[type, str]]


def split_options(
    options: Mapping[str, Scalar], members: Iterable[str]
) -> tuple[dict[str, Scalar], dict[str, dict[str, Scalar]]]:
    """``{"level": "all", "large.num_heads": 16}`` -> the backend's options, and each member's own."""
    own: dict[str, dict[str, Scalar]] = {name: {} for name in members}
    rest: dict[str, Scalar] = {}
    for key, value in options.items():
        member, dot, name = key.partition(".")
        if not dot:
            rest[key] = value
        elif member in own:
            own[member][name] = value
        else:
            raise unknown_name("member in option", key, [f"{m}.{name}" for m in own])
    return rest, own


def typed(options: Mapping[str, Scalar], known: Known, *, what: str) -> dict[str, Scalar]:
    """Checks names and turns text, as a command line gives it, into the declared types.

    Raises ``UnknownName`` with the nearest known option, ``BadInput`` for a value of another type.
    """
    return {name: _typed(name, value, known, what) for name, value in options.items()}


def _typed(name: str, value: Scalar, known: Known, what: str) -> Scalar:
    if name not in known:
        raise unknown_name(f"option of {what}", name, known)
    kind, meaning = known[name]
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, str) and kind is not str:
        try:
            return words[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            pass
    elif type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(kind, kind.__name__)
    close = nearest(str(value), words) if kind is bool else None
    raise BadInput(
        f"option {name} of {what} is {value!r}; allowed is {wanted} ({meaning})",
        hint=f"did you mean {close}?" if close else f"write it as --option {name}=VALUE",
    )
