"""The model families by name; a family's module is imported when it is opened."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from tstitch_engines.errors import unknown_name
from tstitch_export.families.base import Family, Inspection

__all__ = ["FAMILIES", "Family", "Inspection", "open_family"]

FAMILIES: Final = {
    "clip-text": ("tstitch_export.families.clip_text.family", "ClipTextFamily"),
    "controlnet": ("tstitch_export.families.controlnet.family", "ControlNetFamily"),
    "dit": ("tstitch_export.families.dit.family", "DiTFamily"),
    "ldm": ("tstitch_export.families.ldm.family", "LDMFamily"),
    "unet-sd": ("tstitch_export.families.unet.family", "StableDiffusionFamily"),
    "unet-sdxl": ("tstitch_export.families.unet.family", "SdxlFamily"),
    "uvit": ("tstitch_export.families.uvit.family", "UViTFamily"),
    "vae-decoder": ("tstitch_export.families.vae.family", "VaeDecoderFamily"),
    "vae-encoder": ("tstitch_export.families.vae.family", "VaeEncoderFamily"),
}


def open_family(name: str) -> Family:
    """The family called ``name``. Raises ``UnknownName``."""
    if name not in FAMILIES:
        raise unknown_name("model family", name, FAMILIES)
    module, attribute = FAMILIES[name]
    family: Family = getattr(import_module(module), attribute)()
    return family
