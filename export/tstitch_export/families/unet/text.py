"""How a prompt reaches a UNet or ControlNet of Stable Diffusion or SDXL."""

from __future__ import annotations

from tstitch_engines.bundle.manifest import TextInputs
from tstitch_engines.errors import BadCheckpoint
from tstitch_export.families.unet.config import UNetConfig
from tstitch_export.families.unet.source import Source

__all__ = ["text_inputs"]


def text_inputs(source: Source, config: UNetConfig) -> TextInputs:
    """Stable Diffusion takes the prompt's hidden states. SDXL also takes its projection and six sizes of the image.

    SDXL's refiner has the second text encoder only, so its projection is as wide as its text, and takes five numbers,
    the last an aesthetic score. Raises ``BadCheckpoint``.
    """
    width = config.width
    assert width is not None, "checked with the kind"
    if config.kind == "sd":
        return TextInputs(hidden=("text_encoder",), width=width)
    total, embedded = (
        int(config[key] or 0) for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    )
    index = source.facts.index or {}
    refiner = bool(index.get("requires_aesthetics_score", total - 5 * embedded == width))
    numbers = 5 if refiner else 6
    pooled = total - numbers * embedded
    if pooled < 1:
        raise BadCheckpoint(
            f"{source.path}: projection_class_embeddings_input_dim is {total}, less than "
            f"{numbers} numbers of addition_time_embed_dim {embedded}",
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
