"""What the kind of a UNet implies of its training, where nothing says it. Stable Diffusion 2.x is the kind in doubt.

Its two branches have equal shapes: 512-base predicts eps, 768-v predicts v. They are told apart as ComfyUI does it
(comfy/supported_models.py, SD20: the spread of one bias) and as diffusers does it (single_file_utils.py: the step at
which the published files were saved).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tstitch_export.checkpoint.conventions import Statement
from tstitch_export.families.unet.config import UNetConfig, published_name

__all__ = ["SPREAD_OF", "Implied", "implied_by", "native_size"]

_TEXT_WIDTH: Final = 1024  # of OpenCLIP ViT-H, which Stable Diffusion 2.x alone reads
SPREAD_OF: Final = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"  # in the file output_blocks.11.1...
_SPREAD: Final = 0.09  # of 768-v it is above
_SAVED_AT: Final = {875_000: "eps", 110_000: "v"}  # 512-base-ema.ckpt of 2.0, v2-1_768-ema-pruned.ckpt
_SIDES: Final = {64: "eps", 96: "v"}


@dataclass(frozen=True)
class Implied:
    """``undecided``: why nothing can be taken for granted; ``None`` where the usual conventions stand."""

    statements: tuple[Statement, ...] = ()
    undecided: str | None = None


def implied_by(config: UNetConfig, step: int | None, bias: Callable[[], float | None]) -> Implied:
    """``step``: of its training, at which it was saved; ``bias`` gives the standard deviation of the tensor
    ``SPREAD_OF``. ``None`` where there is none.
    """
    if config.kind != "sd" or config.width != _TEXT_WIDTH:
        return Implied()
    name = published_name(config) or ""
    if _inpaints(config):
        return Implied((Statement(source="Stable Diffusion 2's inpainting model", prediction="eps"),))
    if name.startswith("BK-SDM"):
        return Implied((Statement(source=f"{name}, made from the 512-base model", prediction="eps"),))
    found = []
    if spread := bias():  # zero in a model that was not trained
        predicts = "v" if spread > _SPREAD else "eps"
        found.append(Statement(source=f"the spread {spread:.3g} of {SPREAD_OF}", prediction=predicts))
    if step in _SAVED_AT:
        found.append(Statement(source=f"its global_step {step}", prediction=_SAVED_AT[step]))
    side = config.raw.get("sample_size")
    if not found and isinstance(side, int) and side in _SIDES:
        found.append(Statement(source=f"its config.json (sample_size {side})", prediction=_SIDES[side]))
    why = "Stable Diffusion 2.x predicts eps at 512 pixels and v at 768, and its weights don't tell which it is"
    return Implied(tuple(found), None if found else why)


def native_size(config: UNetConfig, prediction: str | None) -> tuple[int, int]:
    """Height and width of the latent that the published model has: 512, 768 or 1024 pixels over 8."""
    if config.raw.get("sample_size") is None and prediction == "v" and _in_doubt(config):
        return 96, 96
    return config.native


def _in_doubt(config: UNetConfig) -> bool:
    return config.kind == "sd" and config.width == _TEXT_WIDTH and not _inpaints(config)


def _inpaints(config: UNetConfig) -> bool:
    return int(config["in_channels"]) > int(config["out_channels"])
