"""Whether a loaded module computes what its class and its configuration say, since engines are made from these."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, Final

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.code_origin import (
    exchanged_in_torch,
    foreign_mode,
    library_base,
    made_again,
    names_read,
    overrides,
    patched_function,
    stranger_in,
)
from tstitch_trt.pipeline.weights import FUSED, check_values, sample_of
from tstitch_trt.pipeline.wrapped import odd_hook, odd_wrapper, parts_of, replaced_method, unwrap_compiled

__all__ = ["PROCESSORS", "StockModule", "check_stock"]

# Attention by other kernels or in slices: the same arithmetic, up to rounding
PROCESSORS: Final[Mapping[str, frozenset[str]]] = {
    "AttnProcessor2_0": frozenset({
        "AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor", "FusedAttnProcessor2_0",
        "AttnProcessorNPU", "XLAFlashAttnProcessor2_0",
    }),
    "AttnAddedKVProcessor2_0": frozenset({
        "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "XFormersAttnAddedKVProcessor", "SlicedAttnAddedKVProcessor",
    }),
}  # fmt: skip
# Attributes that choose how something is computed and not what, or that calls look at themselves (tiling)
_HARMLESS: Final = frozenset({
    "gradient_checkpointing", "_gradient_checkpointing_func", "fused_projections", "_chunk_size", "_chunk_dim",
    "use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor",
    "_internal_dict", "processor", "_hf_hook", "_old_forward", "_diffusers_hook", "_compiled_call_impl", "training",
    "original_attn_processors", "peft_config", "_hf_peft_config_loaded", "lora_scale", "_safe_fusing",
    "_merged_adapters", "_prepare_lora_hotswap_kwargs", "hf_device_map",
})  # fmt: skip
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
_ORDERED: Final = ("ModuleList", "Sequential")
_TENSORS: Final = ("_parameters", "_buffers")
_FUSED: Final = tuple(f".{name}" for name in FUSED)
# By what a difference says: the call that ends it
_ENDED_BY: Final[Mapping[str, str]] = {
    "IPAdapter": "pipe.unload_ip_adapter()",
    "LoRA": "pipe.unload_lora_weights()",
    "processor is": "unet.set_default_attn_processor()",
    **dict.fromkeys((".b1 is", ".b2 is", ".s1 is", ".s2 is"), "pipe.disable_freeu()"),
    "hooks has": "remove() of the handle that register_forward_hook returned",
    "would run under": "leave its with block",
    "padding_mode": "load the model again, or set padding_mode to 'zeros'",
}


@dataclass(frozen=True)
class StockModule:
    """A module that is what its class and configuration say, to be looked at again before each call."""

    what: str
    module: Any
    twin: _Twin
    config: Mapping[str, Any]
    sample: Mapping[str, Any]

    def check(self, module: Any) -> None:
        """Raises ``BadInput`` where ``module`` is another one, or has changed since."""
        again = "call tstitch_trt.accelerate again"
        own = unwrap_compiled(module)
        if own is not self.module:
            raise BadInput(f"{self.what} is not the one that was accelerated", hint=f"{again}, or put it back")
        parts = parts_of(own)
        check_values(parts, self.what, needed=False)  # whoever wants their memory back may let them go
        _check_wrapper(module, self.what)
        _check_code(parts, self.what)
        _check_structure(parts, self.twin, self.what)
        now, then = _settings(own), self.config
        for name in sorted(now.keys() | then.keys()):
            if now.get(name) != then.get(name):
                raise BadInput(
                    f"the configuration of {self.what} has changed since it was accelerated: {name} was "
                    f"{shown(then.get(name))}, and is {shown(now.get(name))}",
                    hint=again,
                )
        for name, value in sample_of(parts).items():
            if not value.equal(self.sample.get(name, value)):
                raise BadInput(f"{self.what} has other weights than when it was accelerated, in {name}", hint=again)


@dataclass(frozen=True)
class _Twin:
    """A module made from the configuration alone: its submodules by their paths, and the names their code reads."""

    parts: Mapping[str, Any]
    known: frozenset[str]


def check_stock(module: Any, what: str) -> StockModule:
    """Raises ``BadInput`` where a diffusers module does other than its class and configuration say.

    It is compared with a module made from its configuration, submodule by submodule: classes, attributes, hooks and
    the names and shapes of tensors, while the functions of the classes must be those that their libraries define.
    What only places, casts, slices or compiles is let through.
    """
    import torch

    own = unwrap_compiled(module)
    base = library_base(type(own))
    if base.__module__.partition(".")[0] != "diffusers" or not hasattr(base, "from_config"):
        raise _other(what, f"it is a {_name(type(own))}")
    parts = parts_of(own)
    check_values(parts, what)
    _check_wrapper(module, what)
    _check_code(parts, what)
    with torch.device("meta"):
        made = parts_of(made_again(base, own.config))
    classes: set[Any] = {type(part) for part in made.values()}
    twin = _Twin(made, names_read(*sorted(classes, key=_name)))
    _check_structure(parts, twin, what)
    return StockModule(what, own, twin, _settings(own), sample_of(parts))


def _check_wrapper(module: Any, what: str) -> None:
    if odd := odd_wrapper(module):
        raise _other(what, odd)


def _settings(module: Any) -> dict[str, Any]:
    """Its configuration without where it came from."""
    return {name: value for name, value in module.config.items() if not name.startswith("_")}


def _other(what: str, thing: str) -> BadInput:
    fix = next((f": {call}" for sign, call in _ENDED_BY.items() if sign in thing), "")
    return BadInput(
        f"{what} does other than its class and configuration say: {thing}",
        hint=f"engines are made from weights and configuration: undo it{fix}",
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_code(parts: Mapping[str, Any], what: str) -> None:
    """Every function is a library's own: of the classes, of the modules that define them, and of PyTorch."""
    import torch

    torch_modules: Any = torch.nn.modules.module
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if getattr(torch_modules, kind):
            raise _other(what, f"torch.nn.modules.module has {kind[1:].replace('_', ' ')}")
    if mode := foreign_mode():
        raise _other(what, f"it would run under a {mode}")
    classes: set[Any] = {type(part) for part in parts.values()}
    classes |= {type(vars(part)["processor"]) for part in parts.values() if "processor" in vars(part)}
    own = sorted({library_base(cls) for cls in classes}, key=_name)
    read = names_read(*own)
    for cls in classes:
        base = library_base(cls)
        if (replaced := overrides(cls, read)) and base is not object:
            name, owner = next(iter(replaced.items()))
            raise _other(what, f"it has a {_name(owner)}, which replaces {base.__name__}.{name}")
        if patched := patched_function(base, read):
            raise _other(what, f"{patched} was replaced")
    homes = {sys.modules[base.__module__] for cls in classes for base in cls.__mro__ if base.__module__ in sys.modules}
    for home in sorted(homes, key=lambda home: home.__name__):
        names = {"diffusers": read, "torch": ()}.get(home.__name__.partition(".")[0])
        if names is not None and (found := stranger_in(home, names)):
            raise _other(what, f"{found} was replaced")
    if found := exchanged_in_torch(names_read(*own, functions=True)):
        raise _other(what, f"{found} was replaced")


def _check_structure(parts: Mapping[str, Any], twin: _Twin, what: str) -> None:
    same = twin.parts
    for path, part in parts.items():
        if path.endswith(_FUSED):
            continue  # compared with what they were fused from, in weights.py
        where = f"{path}." if path else ""
        if path not in same:
            raise _other(what, f"it has a {_name(type(part))} at {path}")
        if library_base(type(part)) is not type(same[path]):
            raise _other(what, f"{path or 'it'} is a {_name(type(part))}, where {_name(type(same[path]))} is expected")
        for thing in _differences(part, same[path], twin.known):
            raise _other(what, f"{where}{thing}")
    for path in same.keys() - parts.keys():
        raise _other(what, f"it has no {path}")


def _differences(part: Any, twin: Any, known: frozenset[str]) -> Iterator[str]:
    """What of ``part`` is not as in ``twin``, a submodule made from the configuration."""
    mine, theirs = vars(part), vars(twin)
    for kind in _HOOKS:
        if len(mine[kind]) != len(theirs[kind]):
            yield f"{kind.strip('_')} has {[_function_name(hook) for hook in mine[kind].values()]}"
    if hook := odd_hook(part):
        yield f"_hf_hook or _diffusers_hook is a {hook}"
    for kind in _TENSORS:
        own, expected = _shapes(mine[kind]), _shapes(theirs[kind])
        if own != expected:
            yield f"{kind.strip('_')} are {own}; expected are {expected}"
    if type(twin).__name__ in _ORDERED:
        order, right = list(mine["_modules"]), list(theirs["_modules"])
        if order != right and sorted(order) == sorted(right):
            yield f"layers are in the order {', '.join(order)}"
    if part.training and getattr(part, "p", 0) and "Dropout" in type(part).__name__:
        yield f"training is on, with dropout {part.p} (eval() ends it)"
    if "processor" in mine and "processor" in theirs:
        yield from _processor(mine["processor"], theirs["processor"])
    if mine.get("_compiled_call_impl") is not None and (by := replaced_method(part, "_compiled_call_impl")):
        yield f"_compiled_call_impl is {by}"
    for name in sorted((mine.keys() | theirs.keys()) - _HARMLESS - _module_state()):
        if name not in theirs:
            yield from _added(part, name, known)
        elif not _same(value := mine.get(name, mine["_modules"].get(name)), theirs[name]):
            yield f"{name} is {_shown(value)}; expected is {_shown(theirs[name])}"


def _added(part: Any, name: str, known: frozenset[str]) -> Iterator[str]:
    """An attribute that the class does not set itself: nothing, unless its code would find it."""
    value = vars(part)[name]
    if callable(getattr(type(part), name, None)):
        if by := replaced_method(part, name):
            yield f"{name} was replaced by {by}"
    elif (name in known or hasattr(type(part), name)) and value is not None and value is not False:
        yield f"{name} is {shown(value)}, which is not there by default"


def _processor(mine: Any, theirs: Any) -> Iterator[str]:
    base = library_base(type(mine))
    allowed = PROCESSORS.get(type(theirs).__name__, frozenset({type(theirs).__name__}))
    if base.__name__ not in allowed or not base.__module__.startswith("diffusers."):
        yield f"processor is a {_name(type(mine))}"
    elif changed := [name for name in vars(mine) if callable(getattr(type(mine), name, None))]:
        yield f"processor.{changed[0]} was replaced"


def _shapes(tensors: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}


def _shown(value: Any) -> str:
    return f"a {_name(type(value))}" if hasattr(value, "named_modules") else shown(value)


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, FunctionType) and isinstance(theirs, FunctionType):  # made anew by every constructor
        return mine.__code__ is theirs.__code__
    if type(mine) is type(theirs) and hasattr(mine, "register_to_config"):  # a scheduler in a VAE
        return bool(mine.config == theirs.config)
    return mine is theirs or (type(mine) is type(theirs) and bool(mine == theirs))


def _function_name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


@cache
def _module_state() -> frozenset[str]:
    """What PyTorch keeps in every module, and what of it is compared on its own."""
    import torch

    return frozenset(vars(torch.nn.Module()))
