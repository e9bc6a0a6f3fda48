"""Models with the weights of a checkpoint. Imported only where a model is loaded (torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tstitch_engines.errors import BadCheckpoint

__all__ = ["Conditioned", "assemble", "fill"]


def fill(make: Callable[[], nn.Module], state: Mapping[str, Tensor], *, name: str) -> nn.Module:
    """The model that ``make`` gives, with the weights ``state`` of the file ``name``, float32 and in eval mode.

    Raises ``BadCheckpoint`` where the model and its weights don't fit, or a weight is NaN, infinite or no real number.
    """
    if odd := next((key for key, tensor in state.items() if not tensor.is_floating_point()), None):
        raise BadCheckpoint(
            f"{name}: {odd} is stored as {str(state[odd].dtype).removeprefix('torch.')}; wanted are real numbers",
            hint="give the weights in float16, bfloat16 or float32",
        )
    if bad := next((key for key, tensor in state.items() if not torch.isfinite(tensor).all()), None):
        raise BadCheckpoint(f"{name}: {bad} holds NaN or infinity", hint="take a checkpoint from before that")
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = make()
        if dict(model.named_buffers()).keys() - model.state_dict().keys():
            model = make()  # it computes tables that no state dict holds
        model.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    except Exception as error:  # whatever a library's constructor makes of numbers from a file
        reason = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = reason[min(1, len(reason) - 1)] if reason else type(error).__name__
        raise BadCheckpoint(
            f"{name}: the weights do not fit their configuration: {shown}",
            hint="copy config.json and the weights from the same model",
        ) from None
    return model.float().eval().requires_grad_(False)


def assemble(kind: Any, config: Mapping[str, Any], state: Mapping[str, Tensor], *, name: str) -> nn.Module:
    """A diffusers module of the class ``kind``, made from its ``config.json``. Raises what ``fill`` does.

    Every ``Upsample2D`` is replaced; parameters and their names stay. diffusers' own copies its input for batches from
    64 on and for large images, around a fault of older CUDA kernels. Tracing takes those branches for limits of the
    model: at most 63 images, of less than 2^31 elements.
    """
    from diffusers.models.upsampling import Upsample2D

    own = {key: value for key, value in config.items() if not key.startswith("_")}
    model = fill(lambda: kind.from_config(own), state, name=name)
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            plain = isinstance(child, Upsample2D) and child.norm is None and child.interpolate
            if plain and not child.use_conv_transpose and child.name == "conv":
                setattr(module, child_name, _Upsample(cast("nn.Module | None", child.conv)).eval())
    return model


class Conditioned(nn.Module):
    """A diffusers denoiser as ``(sample [B,C,H,W], timestep [B] float, condition) -> [B,C or 2C,H,W]``.

    The condition goes to its ``argument``.
    """

    def __init__(self, inner: nn.Module, argument: str) -> None:
        super().__init__()
        self.inner = inner
        self.argument = argument

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = self.inner(sample, timestep, return_dict=False, **{self.argument: condition})[0]
        return out


class _Upsample(nn.Module):
    """Doubles height and width, each element four times, and applies the convolution if there is one."""

    def __init__(self, conv: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: int | None = None) -> Tensor:
        scale = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        hidden_states = F.interpolate(hidden_states, mode="nearest", **scale)
        return hidden_states if self.conv is None else self.conv(hidden_states)
