"""Whether a pipeline or a scheduler runs the code of the diffusers class that it is taken for."""

from __future__ import annotations

import inspect
import sys
from dis import get_instructions
from functools import cache
from types import CodeType, FunctionType
from typing import Any, Final

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.code_origin import (
    library_base,
    made_again,
    names_read,
    overrides,
    patched_function,
    stranger,
    stranger_in,
)

__all__ = ["check_pipeline_code", "pipeline_class", "scheduler_class"]

# What an accelerated pipeline calls of its pipeline, so that another version of it is honoured
_CALLED: Final = frozenset({
    "encode_prompt", "check_inputs", "run_safety_checker", "maybe_free_model_hooks", "components", "_execution_device",
    "progress_bar", "set_progress_bar_config", "device", "dtype", "__init__",
})  # fmt: skip
# Noise that solvers add in every step is drawn by the runtime, as ``accelerate`` says
_OWN_NOISE: Final = frozenset({"randn_tensor"})
_ABSTRACT: Final = ("SchedulerMixin", "ConfigMixin", "DiffusionPipeline", "object")


def pipeline_class(pipe: Any) -> type:
    """The class of diffusers that the class of ``pipe`` is or derives from; ``object`` where there is none."""
    base = library_base(type(pipe))
    return object if base.__name__ in _ABSTRACT else base


def check_pipeline_code(pipe: Any) -> None:
    """Raises ``BadInput`` where something was put in place of what the call of its diffusers class runs."""
    base = pipeline_class(pipe)
    read = _reached(base) - _CALLED
    fix = "call the pipeline itself, or undo it: engines draw as the class of diffusers does"
    for name, owner in overrides(type(pipe), {*read, "__getattr__", "__getattribute__"}).items():
        raise BadInput(
            f"the pipeline is a {owner.__name__}, whose {name} is not that of {base.__name__} and would be ignored",
            hint=fix,
        )
    for name in vars(pipe):
        if name in read and hasattr(base, name):
            raise BadInput(f"{name} of the pipeline was replaced, which would be ignored", hint=fix)
    if found := stranger_in(sys.modules[base.__module__], names_read(base)):
        raise BadInput(f"{found} was replaced, which would be ignored", hint=fix)
    for cls in base.__mro__:
        for name, value in vars(cls).items():
            if name in read and stranger(value):
                raise BadInput(f"{cls.__name__}.{name} was replaced, which would be ignored", hint=fix)


def scheduler_class(scheduler: Any) -> str:
    """The name of the diffusers class that decides the steps.

    Raises ``BadInput`` for a class of another origin, for one that replaces functions of its base, and for a scheduler
    whose tables or functions are not those that the class makes of the configuration.
    """
    base = library_base(type(scheduler))
    if base.__name__ in _ABSTRACT or not base.__module__.startswith("diffusers."):
        raise BadInput(
            f"the pipeline's scheduler is a {type(scheduler).__module__}.{type(scheduler).__qualname__}; allowed are "
            "diffusers' own classes",
            hint="set one of them: pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)",
        )
    fix = f"set diffusers' own: pipe.scheduler = {base.__name__}.from_config(pipe.scheduler.config)"
    read = names_read(base)
    if replaced := overrides(type(scheduler), read):
        name, owner = next(iter(replaced.items()))
        raise BadInput(
            f"the pipeline's scheduler is a {owner.__name__}, whose {name} is not that of {base.__name__} and would be "
            "ignored",
            hint=fix,
        )
    home = sys.modules[base.__module__]
    if patched := patched_function(base, read) or stranger_in(home, vars(home).keys() - _OWN_NOISE):
        raise BadInput(f"{patched} was replaced, which would be ignored", hint=fix)
    twin = made_again(base, scheduler.config)
    mine, theirs = vars(scheduler), vars(twin)
    for name in mine:
        if callable(getattr(base, name, None)):
            raise BadInput(f"{name} of the pipeline's scheduler was replaced, which would be ignored", hint=fix)
        if name in theirs and name not in _state(base) and not _same(mine[name], theirs[name]):
            raise BadInput(
                f"{name} of the pipeline's scheduler is {shown(mine[name])}, which is not what its configuration gives "
                "and would be ignored",
                hint=fix,
            )
    return base.__name__


@cache
def _reached(cls: type) -> frozenset[str]:
    """The functions and properties of a pipeline class that its call runs."""
    found: set[str] = set()
    waiting = ["__call__"]
    while waiting:
        name = waiting.pop()
        if name in found or not hasattr(cls, name):
            continue
        found.add(name)
        value = getattr(cls, name)
        for function in (value.fget,) if isinstance(value, property) else (value,):
            waiting += _names(function)
    return frozenset(found)


def _names(value: Any) -> list[str]:
    code = getattr(inspect.unwrap(value), "__code__", None)
    waiting, found = [code] if code else [], list[str]()
    while waiting:
        one = waiting.pop()
        found += one.co_names
        waiting += [inner for inner in one.co_consts if isinstance(inner, CodeType)]
    return found


@cache
def _state(cls: type) -> frozenset[str]:
    """The attributes of a scheduler class that stepping writes: all that its methods assign, but for constructing
    it, and for those that only move tables to a device."""
    found = {"_internal_dict", "timestep_list"}  # UniPC fills its list in place
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and name not in ("__init__", "add_noise", "get_velocity"):
                code = inspect.unwrap(value).__code__
                found |= {str(step.argval) for step in get_instructions(code) if step.opname == "STORE_ATTR"}
    return frozenset(found)


def _same(mine: Any, theirs: Any) -> bool:
    import torch

    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        left, right = mine.detach().cpu().double(), theirs.double()
        return left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, atol=0)
    if isinstance(mine, FunctionType) and isinstance(theirs, FunctionType):  # made anew by every constructor
        return mine.__code__ is theirs.__code__
    return type(mine) is type(theirs) and bool(mine == theirs)
