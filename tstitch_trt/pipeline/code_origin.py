"""Which classes and functions are a library's own, and what a subclass or a patch puts in their place."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

__all__ = [
    "is_exchanged",
    "library_base",
    "made_again",
    "names_in_code",
    "overrides",
    "patched_function",
    "stranger",
    "stranger_in",
]

_LIBRARIES: Final = ("torch", "diffusers", "accelerate", "huggingface_hub", "transformers", "peft")
_STANDARD: Final = sysconfig.get_paths()["stdlib"]
# What a class statement itself writes, and constructors: what these did is seen in the object
_UNSEEN: Final = frozenset({
    "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__init__", "__slots__",
    "__parameters__", "__orig_bases__", "__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl",
})  # fmt: skip


def library_base(cls: type) -> type:
    """``cls`` where a library defines it, else the first of its bases for which that holds."""
    return next(base for base in cls.__mro__ if base is object or _is_library_class(base))


def made_again(cls: Any, config: Mapping[str, Any]) -> Any:
    """A fresh object of a diffusers class with this configuration, as ``from_config`` makes it but without its log."""
    return cls(**{name: config[name] for name in signature(cls).parameters if name in config})


def overrides(cls: type) -> dict[str, type]:
    """By name what ``cls`` and its bases before ``library_base`` put in place of that base's own, and the class."""
    base = library_base(cls)
    found: dict[str, type] = {}
    for own in cls.__mro__[: cls.__mro__.index(base)]:
        replaced = [name for name in vars(own) if name not in _UNSEEN and _is_read(base, name)]
        found |= {name: own for name in replaced if name not in found}
    return found


def patched_function(cls: type) -> str | None:
    """The first function of ``cls`` or a base of it that was not defined by that class, as ``Class.name``.

    Functions that were only added, under names that neither the class nor a base of it has, do not count.
    """
    for base in cls.__mro__[:-1]:
        for name, value in vars(base).items():
            function = _function(value)
            foreign = stranger(value) is not None or (function is not None and not _belongs(function, base))
            if foreign and name not in _UNSEEN and not _is_addition(base, name):
                return f"{base.__name__}.{name}"
    return None


def stranger(value: object) -> str | None:
    """The file of a function outside of the libraries that ``value`` is or wraps."""
    return next((code.co_filename for code in _codes(value, set()) if not _in_library(code.co_filename)), None)


def stranger_in(module: ModuleType) -> str | None:
    """The name of a function in ``module`` that no library defines, as ``module.name``."""
    return next((f"{module.__name__}.{name}" for name, value in vars(module).items() if stranger(value)), None)


def is_exchanged(space: ModuleType, name: str) -> bool:
    """Whether a function of PyTorch was replaced: by a stranger's, or by another one of its own."""
    value = vars(space).get(name)
    other = callable(value) and getattr(value, "__name__", name) not in (name, f"_{name}")
    return stranger(value) is not None or (other and space.__name__ == "torch.nn.functional")


@cache
def names_in_code(*classes: Any) -> frozenset[str]:
    """All attributes and texts that the functions of these classes and their bases name."""
    bases = {base for cls in classes for base in cls.__mro__}
    functions = (function for base in bases for value in vars(base).values() for function in _codes(value, set()))
    return frozenset(name for code in functions for name in _names(code))


def _is_library_class(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    if not _in_library(getattr(found, "__file__", None) or ""):
        return False
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def _is_read(base: type, name: str) -> bool:
    return hasattr(base, name) or name in names_in_code(base)


@cache
def _in_library(file: str) -> bool:
    if file.startswith("<"):
        return file == "<string>"  # the constructors of dataclasses and named tuples
    homes = [(module.__file__ or "").rpartition("__init__")[0] for name in _LIBRARIES if (module := _loaded(name))]
    if any(home and file.startswith(home) for home in homes):
        return True
    return file.startswith(_STANDARD) and "-packages" not in file[len(_STANDARD) :]


def _loaded(name: str) -> ModuleType | None:
    return sys.modules.get(name)


def _function(value: object) -> FunctionType | None:
    inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return inner if isinstance(inner, FunctionType) else None


def _belongs(function: FunctionType, cls: type) -> bool:
    """Whether the module of ``cls`` defines it, or PyTorch: some take over functions of ``torch.nn.Module`` as they
    are, and compiling exchanges some of those."""
    return function.__module__ == cls.__module__ or function.__module__.startswith("torch.")


def _is_addition(cls: type, name: str) -> bool:
    inherited = any(name in vars(base) for base in cls.__mro__[1:])
    return not inherited and not name.startswith("__") and name not in _source(cls.__module__)


@cache
def _source(module: str) -> str:
    return Path(sys.modules[module].__file__ or "").read_text(encoding="utf-8")


def _codes(value: object, seen: set[int]) -> Iterator[CodeType]:
    """The code of a function, and of all functions that it wraps."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: tuple[object, ...] = ()
    if isinstance(value, classmethod | staticmethod):
        inner = (value.__func__,)
    elif isinstance(value, property):
        inner = (value.fget, value.fset, value.fdel)
    elif isinstance(value, FunctionType):
        yield value.__code__
        inner = (getattr(value, "__wrapped__", None), *_cells(value))
    for one in inner:
        yield from _codes(one, seen)


def _cells(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names(constant)
