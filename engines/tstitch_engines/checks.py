"""Checks of values from outside. Each returns the value in its own plain type or raises ``BadInput`` with its name.

What a caller hands in is foreign: its ``__len__``, ``__iter__``, ``__index__``, ``__array__`` or ``__repr__`` may raise
anything, an iterator may never end, and a subclass of ``int`` or ``str`` may lie. Nothing here trusts them.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import wraps
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np

from tstitch_engines.errors import BadInput, TStitchError, unknown_name

__all__ = [
    "FLOAT32_MAX",
    "Check",
    "check_callable",
    "check_checkpoint",
    "check_checkpoints",
    "check_choice",
    "check_items",
    "check_number",
    "check_path",
    "check_precision",
    "check_switch",
    "check_text",
    "check_type",
    "check_whole",
    "checked",
    "items_of",
    "optional",
    "plain_number",
    "read_items",
    "read_mapping",
    "read_pair",
    "run_check",
    "shown",
    "taken_as_is",
]

P = ParamSpec("P")
T = TypeVar("T")
Check = Callable[[object, str], object]

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)  # the kernels compute in float32: beyond it is infinity
_SHOWN: Final = 80  # characters of a bad value that a message repeats
_LONGEST_PATH: Final = 4095  # bytes; a part of it 255 (Linux)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _SHOWN
_repr.maxlist = _repr.maxtuple = 20


def shown(value: object) -> str:
    """``repr(value)`` for a message: short, printable, soon made, and never an error itself."""
    try:
        if isinstance(value, np.ndarray) and value.ndim:
            return f"{value.dtype}{list(value.shape)}"
        if isinstance(value, str | bytes):
            text = repr(value[:_SHOWN])
        elif isinstance(value, Sequence) and len(value) > _SHOWN:
            return f"a {type(value).__name__} of {len(value)} values"
        else:
            text = _repr.repr(value)
    except Exception:  # whatever a foreign object does; and whole numbers of too many digits
        return f"something of type {type(value).__name__}"
    text = text if len(text) <= _SHOWN + 2 else text[: _SHOWN - 3] + "..."
    return "".join(character if character.isprintable() else "?" for character in text)


def run_check(check: Callable[[object, str], T], value: object, what: str) -> T:
    """``check(value, what)``, where what the value's own methods raise is ``BadInput`` too."""
    try:
        return check(value, what)
    except TStitchError:
        raise
    except Exception as error:
        raise BadInput(
            f"{what} is {shown(value)}, and reading it raised {type(error).__name__}",
            hint=f"give {what} as plain numbers, texts, lists or arrays",
        ) from error


# --- single values


def plain_number(value: object) -> int | float | None:
    """The whole or real number that ``value`` is, of Python, numpy or torch, also as an array of no dimension.

    ``None`` for what is none: bools, texts, complex numbers, arrays of some dimension.
    """
    try:
        if isinstance(value, bool | np.bool_ | str | bytes | complex):
            return None
        if type(value) in (int, float):
            return value  # type: ignore[return-value]  # just seen
        dtype = getattr(value, "dtype", None)
        if dtype is not None:
            kind = getattr(dtype, "kind", None) or str(dtype).removeprefix("torch.").lstrip("b")[:1]  # (b)float16
            if kind not in ("i", "u", "f") or len(value.shape):  # type: ignore[attr-defined]  # it has a dtype
                return None
            value = value.detach() if hasattr(value, "detach") else value  # torch warns of a number with a gradient
            return float(value) if kind == "f" else int.__index__(operator.index(value))  # type: ignore[arg-type]
        if hasattr(value, "__index__"):
            return int.__index__(operator.index(value))
        return float.__float__(float(value)) if isinstance(value, Real) else None
    except Exception:
        return None


def check_whole(value: object, what: str, low: int = 0, high: int = 1_000_000, *, example: int | None = None) -> int:
    """A whole number from ``low`` to ``high``, not a bool."""
    number = plain_number(value)
    if not isinstance(number, int) or not low <= number <= high:
        usual = max(low, 1) if example is None else example
        dashes = "-" if len(what) == 1 else "--"
        flag = f" ({dashes}{what.replace('_', '-')} {usual})" if what.isidentifier() else ""
        raise BadInput(
            f"{what} is {shown(value)}; allowed is a whole number from {low} to {high}",
            hint=f"e.g. {what}={usual}{flag}, or leave it out",
        )
    return number


def check_number(value: object, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from ``low`` to ``high`` that float32 holds, not a bool."""
    number = plain_number(value)
    try:
        found = math.nan if number is None else float(number)
    except OverflowError:
        found = math.inf
    if not max(low, -FLOAT32_MAX) <= found <= min(high, FLOAT32_MAX):
        allowed = f"a number from {low:g} to {high:g}"
        if math.isinf(low) and math.isinf(high):
            allowed = "a number"
        elif math.isinf(high):
            allowed = f"a number of {low:g} or more"
        beyond = " that float32 holds" if number is not None and abs(found) > FLOAT32_MAX else ""
        raise BadInput(f"{what} is {shown(value)}; allowed is {allowed}{beyond}", hint=f"give {what} as {allowed}")
    return found


def check_text(value: object, what: str, *, example: str, most: int = 100_000) -> str:
    """A text of at most ``most`` characters that UTF-8 can write."""
    if not isinstance(value, str):
        raise BadInput(f"{what} is {shown(value)}; allowed is a text", hint=f"e.g. {what}={example!r}")
    text = str.__str__(value)
    if len(text) > most:
        raise BadInput(
            f"{what} has {len(text)} characters; allowed are {most}", hint=f"shorten {what} to {most} characters"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{what} is {shown(text)}: character {error.start} is half of a surrogate pair, which is no text",
            hint="decode the text from its bytes again, as UTF-8",
        ) from None
    return text


def check_choice(value: object, what: str, allowed: Collection[str]) -> str:
    """One of the names ``allowed``."""
    text = str.__str__(value) if isinstance(value, str) else None
    if text is None or text not in allowed:
        raise unknown_name(what, shown(value) if text is None else text[:_SHOWN], allowed)
    return text


def check_switch(value: object, what: str) -> bool:
    """``True`` or ``False``, numpy's among them."""
    if not isinstance(value, bool | np.bool_):
        raise BadInput(f"{what} is {shown(value)}; allowed are True and False", hint=f"e.g. {what}=True")
    return bool(value)


def check_path(value: object, what: str) -> Path:
    """A path that this system can have, as text or ``os.PathLike``. Whether anything is there is another question."""
    try:
        text = os.fspath(value)  # type: ignore[call-overload]  # what it is, is the question
        encoded = os.fsencode(str.__str__(text))
        good = 0 < len(encoded) <= _LONGEST_PATH and b"\0" not in encoded
        good = good and max(map(len, encoded.split(b"/"))) <= 255
    except Exception:
        good = False
    if not good:
        raise BadInput(
            f"{what} is {shown(value)}; allowed is a path, of at most {_LONGEST_PATH} bytes and 255 between slashes",
            hint=f'e.g. {what}="folder/file"',
        )
    return Path(text)


def check_checkpoint(value: object, what: str) -> str | Path:
    """A path, or the name of a Hugging Face repository, which only a text can be."""
    path = check_path(value, what)
    return str.__str__(value) if isinstance(value, str) else path


def check_checkpoints(value: object, what: str) -> dict[str, str | Path]:
    """A path or repository for each name."""
    given = read_mapping(value, what, example='{"large": "folder"}')
    return {name: check_checkpoint(one, f"{what} of {name!r}") for name, one in given.items()}


def check_precision(value: object, what: str) -> object:
    """A precision for all, or by name. Which there are is another question."""
    if isinstance(value, Mapping):
        return read_mapping(value, what, example='{"large": "fp16"}')
    return check_text(value, what, example="fp16", most=100)


def check_callable(value: object, what: str) -> Any:
    """A function, or what is called like one."""
    if not callable(value):
        raise BadInput(f"{what} is {shown(value)}; allowed is a function", hint=f"e.g. {what}=print, or leave it out")
    return value


def check_type(value: object, what: str, kind: type[T]) -> T:
    """Something of the type ``kind``."""
    if not isinstance(value, kind):
        raise BadInput(f"{what} is {shown(value)}; allowed is a {kind.__name__}", hint=f"give a {kind.__name__}")
    return value


def taken_as_is(value: T, what: str) -> T:
    """Of arguments that the function itself reads with care: arrays, and objects of other libraries."""
    return value


# --- several values


def read_items(value: object, what: str, most: int, *, allowed: str, example: str) -> list[object]:
    """What a list, tuple, array of one dimension, range or iterator holds: 1 to ``most`` values, in their order.

    Not the characters of a text, the keys of a dict or a set, whose order nobody chose. ``allowed``: "is a list...".
    """
    problem = ""
    try:
        fits = not isinstance(value, str | bytes | bytearray | Mapping | Set) or hasattr(value, "mapping")  # dict views
        if fits and len(getattr(value, "shape", (1,))) == 1:  # an array's elements, not the rows of a table
            found = list(islice(iter(value), most + 1))  # type: ignore[call-overload]  # else a TypeError
            if 0 < len(found) <= most:
                return found
            problem = f": it has {'no values' if not found else f'more than {most:,} values'}"
    except Exception as error:
        if not isinstance(error, TypeError):
            problem = f": reading it raised {type(error).__name__}"
    raise BadInput(f"{what} is {shown(value)}{problem}; allowed {allowed}", hint=f"e.g. {what}={example}")


def read_pair(value: object, what: str, allowed: str, example: str) -> tuple[object, object]:
    """The two values of a list, tuple or array."""
    items = read_items(value, what, 3, allowed=allowed, example=example)
    if len(items) != 2:
        raise BadInput(f"{what} is {shown(value)}; allowed {allowed}", hint=f"e.g. {what}={example}")
    return items[0], items[1]


def items_of(each: Check, most: int = 1000) -> Check:
    """``check_items`` of values that ``each`` checks; an empty list or tuple is none."""

    def check(value: object, what: str) -> object:
        empty = isinstance(value, list | tuple) and not value
        return () if empty else check_items(value, what, each, most)

    return check


def read_mapping(value: object, what: str, *, example: str, most: int = 1000) -> dict[str, object]:
    """A mapping by names of at most ``most`` entries."""
    if isinstance(value, Mapping):
        found = list(islice(value.items(), most + 1))
        if len(found) <= most and all(isinstance(name, str) for name, _ in found):
            return {check_text(name, f"a name in {what}", example="large", most=1000): item for name, item in found}
    raise BadInput(
        f"{what} is {shown(value)}; allowed is a dict by name, of at most {most:,}", hint=f"e.g. {what}={example}"
    )


def check_items(value: object, what: str, each: Callable[[object, str], T], most: int = 1000) -> tuple[T, ...]:
    """A list of 1 to ``most`` values, each one checked by ``each``."""
    items = read_items(value, what, most, allowed=f"is a list of at most {most:,}", example="[...]")
    return tuple(each(item, f"an entry of {what}") for item in items)


# --- the arguments of a function


def optional(check: Check) -> Check:
    """``check``, where ``None`` is "not said"."""
    return lambda value, what: None if value is None else check(value, what)


def checked(*, others: bool = False, **checks: Check) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A public function or method whose arguments are checked before it runs.

    ``checks``: one for each parameter, in the order of the parameters. An argument that is not given is not checked.
    ``others``: keywords beside these are gathered by the function, whose records check them. Unknown and missing
    arguments are ``BadInput`` too.
    """
    known = tuple(checks)

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        scope, _, name = function.__qualname__.rpartition(".")
        first = int(bool(scope) and not scope.endswith("<locals>"))  # self
        most = function.__code__.co_argcount  # arguments that need no name

        @wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> T:
            given: dict[str, Any] = keywords
            for key in given:
                if key in checks:
                    given[key] = run_check(checks[key], given[key], key)
                elif not others:
                    raise unknown_name(f"keyword of {name}", key, known)
            if len(args) > most:
                raise BadInput(
                    f"{name} got {shown(args[most])} without a keyword",
                    hint=f"write it as {name}(KEYWORD=...); help({function.__qualname__}) lists the keywords",
                )
            named = zip(known, args[first:], strict=False)
            passed = [*args[:first], *(run_check(checks[key], value, key) for key, value in named)]
            plain: Any = (*passed, *args[len(passed) :])
            try:
                return function(*plain, **keywords)
            except TypeError as error:
                if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                    raise
                raise BadInput(f"{error}", hint=f"the arguments of {name} are {', '.join(known)}") from None

        call.checks = checks  # type: ignore[attr-defined]  # a test holds them against the parameters
        return call

    return decorate
