"""Family ``unet-sd``: the UNets of Stable Diffusion 1.x and 2.x (arXiv 2112.10752) and their relatives.

BK-SDM (arXiv 2305.15798), fine-tuned and pruned variants, inpainting with 9 channels, LCM with an embedded guidance
scale (arXiv 2310.04378): every ``UNet2DConditionModel`` that a prompt's hidden states alone condition.
"""

from __future__ import annotations

from typing import ClassVar

from tstitch_engines.bundle.manifest import TextInputs
from tstitch_export.families.unet.config import Kind, UNetConfig
from tstitch_export.families.unet.family import UNetFamily
from tstitch_export.families.unet.source import Source

__all__ = ["StableDiffusionFamily"]


class StableDiffusionFamily(UNetFamily):
    name = "unet-sd"
    kind: ClassVar[Kind] = "sd"

    def text(self, source: Source, config: UNetConfig) -> TextInputs:
        assert config.width is not None, "checked with the kind"
        return TextInputs(hidden=("text_encoder",), width=config.width)

    def native(self) -> int:
        return 64
