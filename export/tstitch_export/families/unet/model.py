"""diffusers' UNet and ControlNet modules behind the signatures of a member and of a ControlNet. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["ControlNet", "UNetMember"]


class UNetMember(nn.Module):
    """``forward(sample, timestep, *conditioning)``, the conditioning in the order of ``names``.

    The sinusoids of the timestep and of SDXL's sizes are computed in float32 and cast to the weights' type.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = unet
        self.names = tuple(names)

    def forward(self, sample: Tensor, timestep: Tensor, *conditioning: Tensor) -> Tensor:
        given = dict(zip(self.names, conditioning, strict=True))
        if "inpaint" in given:
            sample = torch.cat([sample, given["inpaint"]], dim=1)
        down = tuple(tensor for name, tensor in given.items() if name.startswith("down_residual_"))
        out: Tensor = self.unet(
            sample,
            timestep,
            given["encoder_hidden_states"],
            timestep_cond=given.get("timestep_cond"),
            added_cond_kwargs=_added(given),
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=given.get("mid_residual"),
            return_dict=False,
        )[0]
        return out


class ControlNet(nn.Module):
    """``forward(sample, timestep, *conditioning)`` -> the residuals times ``control_scale``, the middle one last."""

    def __init__(self, controlnet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.names = tuple(names)

    def forward(self, sample: Tensor, timestep: Tensor, *conditioning: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, conditioning, strict=True))
        down, middle = self.controlnet(
            sample,
            timestep,
            given["encoder_hidden_states"],
            given["control"],
            added_cond_kwargs=_added(given),
            return_dict=False,
        )
        scale = given["control_scale"].to(sample.dtype)[:, None, None, None]
        return (*(residual * scale for residual in down), middle * scale)


def _added(given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """SDXL's own conditioning.

    diffusers joins the embedding of the prompt to the sinusoids, which are float32, and casts both: an ONNX Concat
    wants one type, and float16 to float32 and back loses nothing.
    """
    if "text_embeds" not in given:
        return None
    return {"text_embeds": given["text_embeds"].float(), "time_ids": given["time_ids"]}
