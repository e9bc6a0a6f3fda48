"""The weights of a loaded diffusers module: whether they can be read, what they are, and a sample of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.wrapped import plain_path, unwrap_compiled

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FUSED", "check_values", "sample_of", "stored_weights", "weights_of"]

# What fuse_qkv_projections adds beside the projections themselves, and of which they are made
FUSED: Final = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
_FUSED: Final = tuple(f".{name}" for name in FUSED)
_SAMPLE: Final = 8  # entries of a tensor along its diagonal


def check_values(parts: Mapping[str, Any], what: str, *, needed: bool = True) -> None:
    """Raises ``BadInput`` where the parameters are not what the module computes with, or ``needed`` but not there.

    ``parts``: all of its submodules and itself, by their paths. Fused projections are compared with what they were
    fused from in all values where these are ``needed``, else in a sample, as each call does it.
    """
    if any("base_layer" in part._modules for part in parts.values()):
        raise BadInput(
            f"{what} has LoRA layers beside its weights", hint="fuse them first: pipe.fuse_lora(), then "
            "pipe.unload_lora_weights()"
        )  # fmt: skip
    for path, part in parts.items():
        for name, value in part._parameters.items():
            if value is not None:
                _check_value(value, f"{path}.{name}" if path else name, what)
                if needed and value.is_meta and not _offloaded(parts[""]):
                    raise BadInput(
                        f"{what} has parameters without values: {path}.{name}", hint="load its weights first"
                    )
    fused = [(path, name) for path, part in parts.items() for name in FUSED if name in part._modules]
    values = _values(parts, kept=needed) if fused else {}
    for path, name in fused:
        if not _is_fusion(values, path, name, whole=needed):
            raise BadInput(
                f"{what}.{path}.{name} is not what its projections would be fused to",
                hint="undo it: pipe.unfuse_qkv_projections()",
            )


def _check_value(value: Any, name: str, what: str) -> None:
    import torch

    if type(value) is not torch.nn.Parameter or type(value.data) is not torch.Tensor:
        raise _quantised(what, f"{name} is a {type(value).__name__} of {type(value.data).__name__}")
    if not value.is_floating_point():
        raise _quantised(what, f"{name} holds {value.dtype}")


def weights_of(module: Any) -> dict[str, Tensor]:
    """By name what the module computes with: those of offloaded ones from where they are kept, and no fused copies.

    Types of 8 bits that weights are only stored in become the module's own.
    """
    kept = {name: tensor for name, tensor in stored_weights(module).items() if not _is_fused(name)}
    return {name: tensor.to(module.dtype) if _is_float8(tensor) else tensor for name, tensor in kept.items()}


def stored_weights(module: Any) -> dict[str, Tensor]:
    """Its tensors by their names where nothing is compiled, as they are kept, and from where they are kept."""
    own = unwrap_compiled(module)
    if _offloaded(own):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        found = dict(get_state_dict_offloaded_model(own))
    else:
        found = dict(own.state_dict())
    return {plain_path(name): tensor.detach() for name, tensor in found.items()}


def sample_of(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """By name a few values of each tensor that is there, as the bits of float32 on the CPU: other weights show in it.

    ``parts``: the submodules by their paths. Synchronises once for each device and type.
    """
    import torch

    by_device: dict[Any, dict[str, Tensor]] = {}
    with torch.no_grad():
        for path, part in parts.items():
            for kind in (part._parameters, part._buffers):
                for name, tensor in kind.items():
                    if tensor is not None and not tensor.is_meta and not path.endswith(_FUSED):
                        by_device.setdefault((tensor.device, tensor.dtype), {})[f"{path}.{name}"] = _sample(tensor)
        found: dict[str, Tensor] = {}
        for samples in by_device.values():
            whole = torch.cat(list(samples.values())).float().cpu().view(torch.int32)
            found |= dict(zip(samples, torch.split(whole, [len(one) for one in samples.values()]), strict=True))
    return found


def _sample(tensor: Tensor) -> Tensor:
    """Along the diagonal of the first two dimensions, in the middle of the others: the same in any memory format."""
    shape, stride = tensor.shape, tensor.stride()
    if not shape:
        return tensor.reshape(1)
    length = min(shape[:2])
    step = max(1, length // _SAMPLE)
    offset = sum(size // 2 * each for size, each in zip(shape[2:], stride[2:], strict=True))
    return tensor.as_strided((-(-length // step),), (sum(stride[:2]) * step,), tensor.storage_offset() + offset)


def _quantised(what: str, thing: str) -> BadInput:
    return BadInput(
        f"{what} is quantised: {thing}",
        hint="load it in float32, float16 or bfloat16; tstitch_trt.quantise makes 8 bit members of a bundle",
    )


def _offloaded(module: Any) -> bool:
    """Whether accelerate keeps weights elsewhere and brings each layer's when it runs."""
    return any(_maps(module))


def _maps(module: Any) -> Iterator[bool]:
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            yield getattr(one, "weights_map", None) is not None


def _is_fused(name: str) -> bool:
    return any(f".{part}." in name for part in FUSED)


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def _values(parts: Mapping[str, Any], *, kept: bool) -> Mapping[str, Any]:
    """Parameters by their names; ``kept``: those of offloaded modules from where they are kept."""
    if kept and _offloaded(parts[""]):
        return stored_weights(parts[""])
    return {f"{path}.{name}": value for path, part in parts.items() for name, value in part._parameters.items()}


def _is_fusion(values: Mapping[str, Any], path: str, fused: str, *, whole: bool) -> bool:
    """Whether a fused projection is its sources one below the other: ``whole``, or in a sample of what is there."""
    for kind in ("weight", "bias"):
        own: Any = values.get(f"{path}.{fused}.{kind}")
        each: list[Any] = [values.get(f"{path}.{source}.{kind}") for source in FUSED[fused]]
        if own is None and all(one is None for one in each):
            continue
        if own is None or any(one is None for one in each):
            return False
        if any(one.is_meta for one in (own, *each)):
            if whole:
                return False
            continue
        if len(own) != sum(map(len, each)):
            return False
        pieces = own.split([len(one) for one in each])
        if not all(_equal(piece, one, whole=whole) for piece, one in zip(pieces, each, strict=True)):
            return False
    return True


def _equal(left: Tensor, right: Tensor, *, whole: bool) -> bool:
    import torch

    return left.shape == right.shape and torch.equal(*((left, right) if whole else (_sample(left), _sample(right))))
