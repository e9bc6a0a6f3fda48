"""Methods of a module that something was put in front of: which of it only compiles, places or casts."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any, Final

from tstitch_trt.pipeline.code_origin import library_base

__all__ = ["odd_hook", "odd_wrapper", "parts_of", "plain_path", "replaced_method", "unwrap_compiled"]

# Hooks that move weights and inputs between devices, or store weights in another type than they are computed with
_ACCELERATE: Final = ("AlignDevicesHook", "CpuOffload", "LayerwiseCastingHook")
_DIFFUSERS: Final = (
    "GroupOffloadingHook",
    "LazyPrefetchGroupOffloadingHook",
    "LayerExecutionTrackerHook",
    "LayerwiseCastingHook",
    "PeftInputAutocastDisableHook",
)
_SLOTS: Final = {"_compiled_call_impl": "_call_impl"}  # where torch.compile puts a method of another name


def unwrap_compiled(module: Any) -> Any:
    """The module itself where it was wrapped by ``torch.compile``."""
    return module._orig_mod if _is_wrapper(module) else module


def parts_of(module: Any) -> dict[str, Any]:
    """All submodules and ``module`` itself by their paths, without what ``torch.compile`` wrapped around some."""
    named = module.named_modules(remove_duplicate=False)
    return {plain_path(path): part for path, part in named if not _is_wrapper(part)}


def plain_path(path: str) -> str:
    """The path of a submodule or tensor as it is where nothing is compiled."""
    return path.replace("._orig_mod", "")


def odd_wrapper(module: Any) -> str | None:
    """What a wrapper of ``torch.compile`` around ``module`` or a part of it does beside to compile it."""
    for path, part in module.named_modules(remove_duplicate=False):
        if _is_wrapper(part):
            where = plain_path(path).removeprefix("_orig_mod") or "it"
            if part._forward_hooks or part._forward_pre_hooks:
                return f"the compiled form of {where} has forward hooks"
            if not _file(vars(part).get("forward")).endswith("eval_frame.py"):
                return f"forward of the compiled form of {where} was replaced"
    return None


def _is_wrapper(module: Any) -> bool:
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch.")


def replaced_method(module: Any, name: str) -> str | None:
    """What runs in place of the class's method ``name``; ``None`` where it is the method, however wrapped."""
    value = vars(module)[name]
    own = getattr(type(module), _SLOTS.get(name, name))
    for _ in range(100):  # wrappers of wrappers, and no circle
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is own:
            return None
        behind = _behind(module, value)
        if behind is None:
            break
        value = behind
    function = value.func if isinstance(value, partial) else value
    if getattr(function, "__code__", None) and _file(function).endswith("accelerate/big_modeling.py"):
        return None  # a warning in front of ``to`` and ``cuda`` where layers are on several devices
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(value).__name__)}"


def odd_hook(module: Any) -> str | None:
    """The class of a hook of accelerate or diffusers on ``module`` that does more than to place or cast it."""
    hooks = _accelerate_hooks(vars(module).get("_hf_hook"))
    names = [_unknown(hook, "accelerate.hooks", _ACCELERATE) for hook in hooks]
    registry = vars(module).get("_diffusers_hook")
    names += [_unknown(hook, "diffusers.hooks.", _DIFFUSERS) for hook in (registry.hooks.values() if registry else ())]
    return next((name for name in names if name is not None), None)


def _accelerate_hooks(hook: Any) -> list[Any]:
    if type(hook).__name__ == "SequentialHook":
        return [inner for one in hook.hooks for inner in _accelerate_hooks(one)]
    return [] if hook is None else [hook]


def _unknown(hook: Any, home: str, known: tuple[str, ...]) -> str | None:
    cls = type(hook)
    if not cls.__module__.startswith(home) or cls.__name__ not in known or library_base(cls) is not cls:
        return f"{cls.__module__}.{cls.__qualname__}"
    if getattr(getattr(hook, "group", None), "offload_to_disk_path", None):
        return f"{cls.__name__} that keeps the weights on the disk"
    return None


def _behind(module: Any, value: Any) -> Any:
    """What a wrapper calls, ``None`` where it is none that is known."""
    compiled = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled is not None and _file(value).endswith("eval_frame.py"):
        return compiled
    if not isinstance(value, partial) or not value.args or value.args[0] is not module:
        return None
    where = f"{value.func.__module__}.{value.func.__code__.co_qualname}" if hasattr(value.func, "__code__") else ""
    file = _file(value.func)
    if where.endswith("add_hook_to_module.<locals>.new_forward") and file.endswith("accelerate/hooks.py"):
        return vars(module).get("_old_forward")
    if "HookRegistry.register_hook.<locals>" in where and file.endswith("diffusers/hooks/hooks.py"):
        (reference,) = (cell.cell_contents for cell in value.func.__closure__ or ())
        return reference.original_forward or reference.forward
    return None


def _file(function: Any) -> str:
    file = function.__code__.co_filename if isinstance(function, FunctionType) else ""
    return file.replace("\\", "/")
