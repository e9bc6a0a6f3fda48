"""Family ``unet-sdxl``: SDXL's UNets (arXiv 2307.01952), SSD-1B and Vega (arXiv 2401.02677), and SDXL's refiner.

Besides the prompt's hidden states they take its projection and six sizes of the image; the refiner takes five numbers,
the last an aesthetic score, and has the second text encoder only.
"""

from __future__ import annotations

from typing import ClassVar

from tstitch_engines.bundle.manifest import TextInputs
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.families.unet.config import Kind, UNetConfig
from tstitch_export.families.unet.family import UNetFamily
from tstitch_export.families.unet.source import Source

__all__ = ["SdxlFamily", "sdxl_text"]


class SdxlFamily(UNetFamily):
    name = "unet-sdxl"
    kind: ClassVar[Kind] = "sdxl"

    def text(self, source: Source, config: UNetConfig) -> TextInputs:
        return sdxl_text(source, config)

    def native(self) -> int:
        return 128


def sdxl_text(source: Source, config: UNetConfig) -> TextInputs:
    """How a prompt reaches a UNet or ControlNet of the SDXL kind. Raises ``BadCheckpoint``.

    The refiner's projection is as wide as its text, since both come from the same encoder.
    """
    total, embedded = config.pooled_and_time
    width = config.width
    assert width is not None, "checked with the kind"
    index = source.facts.index or {}
    refiner = bool(index.get("requires_aesthetics_score", total - 5 * embedded == width))
    pooled = total - (5 if refiner else 6) * embedded
    if pooled < 1:
        raise BadCheckpoint(
            f"{source.path}: projection_class_embeddings_input_dim is {total}, less than "
            f"{5 if refiner else 6} numbers of addition_time_embed_dim {embedded}",
            hint="copy config.json and the weights from the same model",
        )
    return TextInputs(
        hidden=("text_encoder_2",) if refiner else ("text_encoder", "text_encoder_2"),
        width=width,
        pooled="text_encoder_2",
        pooled_width=pooled,
        time_ids="aesthetic" if refiner else "sizes",
        # As the published pipelines do it: SDXL takes zeros where there is no negative prompt, its refiner does not.
        zero_null=bool(index.get("force_zeros_for_empty_prompt", not refiner)),
    )
