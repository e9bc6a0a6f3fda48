"""Which classes and functions are a library's own, and what a subclass or a patch puts in their place."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from functools import cache, partial
from inspect import signature
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

__all__ = [
    "exchanged_in_torch",
    "foreign_mode",
    "library_base",
    "made_again",
    "names_read",
    "overrides",
    "patched_function",
    "stranger",
    "stranger_in",
]

_LIBRARIES: Final = ("torch", "diffusers", "accelerate", "huggingface_hub", "transformers", "peft")
_STANDARD: Final = sysconfig.get_paths()["stdlib"]
# Where the code of a module, of its processors and of a scheduler is entered. Constructors are not among them: what
# these did is seen in the object; and neither are loading, saving and moving.
_ENTRIES: Final = frozenset({
    "__call__", "__getattr__", "__getattribute__", "_call_impl", "_wrapped_call_impl", "forward", "encode", "decode",
    "step", "set_timesteps", "scale_model_input", "add_noise", "init_noise_sigma", "state_dict", "config",
    "__iter__", "__getitem__", "__bool__", "__contains__",
})  # fmt: skip
# What PyTorch's tensors are computed with where no name is read
_OPERATORS: Final = frozenset({
    *(f"__{side}{name}__" for side in ("", "r", "i") for name in ("add", "sub", "mul", "truediv", "pow", "matmul")),
    "__neg__", "__getitem__", "__setitem__", "__torch_function__", "__torch_dispatch__",
})  # fmt: skip


def library_base(cls: type) -> type:
    """``cls`` where a library defines it, else the first of its bases for which that holds."""
    return next(base for base in cls.__mro__ if base is object or _is_library_class(base))


def made_again(cls: Any, config: Mapping[str, Any]) -> Any:
    """A fresh object of a diffusers class with this configuration, as ``from_config`` makes it but without its log."""
    return cls(**{name: config[name] for name in signature(cls).parameters if name in config})


def overrides(cls: type, read: Collection[str]) -> dict[str, type]:
    """By name what of ``read`` ``cls`` and its bases before ``library_base`` put in place of that base's own, and
    the class that does."""
    base = library_base(cls)
    found: dict[str, type] = {}
    for own in cls.__mro__[: cls.__mro__.index(base)]:
        found |= {name: own for name in vars(own) if name in read and name not in found}
    return found


def patched_function(cls: type, read: Collection[str]) -> str | None:
    """The first function in ``read``, of ``cls`` or a base, that this class does not define, as ``Class.name``."""
    for base in cls.__mro__[:-1]:
        for name, value in vars(base).items():
            function = _function(value)
            if name in read and (stranger(value) or (function is not None and not _belongs(function, base))):
                return f"{base.__name__}.{name}"
    return None


def stranger(value: object) -> str | None:
    """The file of a function outside of the libraries that ``value`` is or wraps."""
    return next((code.co_filename for code in _codes(value, set()) if not _in_library(code.co_filename)), None)


def stranger_in(module: ModuleType, read: Collection[str] | None = None) -> str | None:
    """The name of what ``module`` has in place of a library's function or of PyTorch's modules, as ``module.name``.

    ``read``: the functions that are looked at, by default all."""
    import torch

    spaces = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    found = (
        name
        for name, value in vars(module).items()
        if ((read is None or name in read) and (stranger(value) or isinstance(value, partial)))
        or spaces.get(name, value) is not value
    )
    return next((f"{module.__name__}.{name}" for name in found), None)


def _is_exchanged(space: ModuleType, name: str) -> bool:
    """Whether a function of PyTorch was replaced: by a stranger's, or by another one of its own."""
    value = vars(space).get(name)
    if isinstance(value, partial):
        return True
    if isinstance(value, FunctionType | BuiltinFunctionType) and not _is_called(value, name):
        return True
    return stranger(value) is not None


def _is_called(function: FunctionType | BuiltinFunctionType, name: str) -> bool:
    """Whether it was defined by this name, but for underscores."""
    return function.__name__.replace("_", "") == name.replace("_", "")


def exchanged_in_torch(read: Collection[str]) -> str | None:
    """The name of a function of PyTorch in ``read``, or of an operation of its tensors, that was replaced."""
    import torch

    for space in (torch.nn.functional, torch, torch._C._nn):
        for name in read & vars(space).keys():
            if _is_exchanged(space, name):
                return f"{space.__name__}.{name}"
    methods = ((name, value) for name, value in vars(torch.Tensor).items() if name in read or name in _OPERATORS)
    return next((f"torch.Tensor.{name}" for name, value in methods if stranger(value)), None)


def foreign_mode() -> str | None:
    """The class of a mode that no library defines and that all of PyTorch's functions run under here."""
    import torch
    from torch.utils import _python_dispatch

    overrides: Any = torch.overrides
    modes = [*overrides._get_current_function_mode_stack(), *_python_dispatch._get_current_dispatch_mode_stack()]
    found = (type(mode) for mode in modes if library_base(type(mode)) is not type(mode))
    return next((f"{cls.__module__}.{cls.__qualname__}" for cls in found), None)


@cache
def names_read(*classes: Any, functions: bool = False) -> frozenset[str]:
    """All attributes and texts that these classes and their bases name in the code that running them reaches.

    ``functions``: also what the functions name that they call, of their own modules and of PyTorch.
    """
    named: dict[str, set[str]] = {}
    spaces: set[Any] = {base for cls in classes for base in cls.__mro__}
    if functions:
        spaces |= {sys.modules[base.__module__] for base in spaces if base.__module__.startswith("diffusers.")}
        spaces |= {sys.modules["torch.nn.functional"]}
    for space in spaces:
        for name, value in vars(space).items():
            named.setdefault(name, set()).update(found for code in _codes(value, set()) for found in _names(code))
    found: set[str] = set()
    waiting = set(_ENTRIES)
    while waiting:
        found |= waiting
        waiting = {name for known in waiting for name in named.get(known, ())} - found
    return frozenset(found)


def _is_library_class(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    if not _in_library(getattr(found, "__file__", None) or ""):
        return False
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


@cache
def _in_library(file: str) -> bool:
    if file.startswith("<"):
        return file == "<string>"  # the constructors of dataclasses and named tuples
    loaded = [sys.modules[name] for name in _LIBRARIES if name in sys.modules]
    homes = [(module.__file__ or "").rpartition("__init__")[0] for module in loaded]
    if any(home and file.startswith(home) for home in homes):
        return True
    return file.startswith(_STANDARD) and "-packages" not in file[len(_STANDARD) :]


def _function(value: object) -> FunctionType | None:
    inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return inner if isinstance(inner, FunctionType) else None


def _belongs(function: FunctionType, cls: type) -> bool:
    """Whether the module of ``cls`` defines it, or PyTorch, and not for another class: some take over functions of
    ``torch.nn.Module`` as they are, and compiling exchanges some of those. A library's decorator may be around it that
    does not say so."""
    homes = (function, *(inner for inner in _cells(function) if isinstance(inner, FunctionType)))
    classes = {"", "<locals>", *(base.__name__ for base in cls.__mro__)}
    return any(
        one.__qualname__.rpartition(".")[0].rpartition(".")[2] in classes
        for one in homes
        if one.__module__ == cls.__module__ or one.__module__.startswith("torch.")
    )


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
    elif isinstance(value, MethodType | partial):
        inner = (value.__func__ if isinstance(value, MethodType) else value.func,)
    elif not isinstance(value, type | ModuleType):  # an object that can be called, or that keeps what it wraps
        inner = (vars(type(value)).get("__call__"), getattr(value, "__dict__", {}).get("__wrapped__"))
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
