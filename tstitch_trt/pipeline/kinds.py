"""The diffusers pipelines that ``tstitch_trt.accelerate`` knows, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.pipeline.code_origin import library_base
from tstitch_trt.pipeline.own_code import check_pipeline_code, pipeline_class
from tstitch_trt.pipeline.wrapped import unwrap_compiled

__all__ = ["KINDS", "PipelineSpec", "kind_of"]


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A pipeline class.

    ``recipe``: that of its pairs. ``starts``: ``image`` is what it starts from; ``masked``: it paints into that.
    ``control``: the argument with the ControlNet's picture. ``distilled``: its guidance scale is an input of the UNet
    or nothing at all, and never a second half.
    """

    recipe: str
    starts: bool = False
    masked: bool = False
    control: str | None = None
    distilled: bool = False

    @property
    def xl(self) -> bool:
        return self.recipe.startswith("sdxl")


def _kinds() -> dict[str, PipelineSpec]:
    found: dict[str, PipelineSpec] = {}
    for name, recipe in (("StableDiffusion", "sd15-bksdm-tiny"), ("StableDiffusionXL", "sdxl-ssd1b")):
        found[f"{name}Pipeline"] = PipelineSpec(recipe=recipe)
        found[f"{name}Img2ImgPipeline"] = PipelineSpec(recipe=recipe, starts=True)
        found[f"{name}InpaintPipeline"] = PipelineSpec(recipe=recipe, starts=True, masked=True)
        found[f"{name}ControlNetPipeline"] = PipelineSpec(recipe=recipe, control="image")
        found[f"{name}ControlNetImg2ImgPipeline"] = PipelineSpec(recipe=recipe, starts=True, control="control_image")
    # Its picture-to-picture sibling chooses other timesteps for a strength.
    found["LatentConsistencyModelPipeline"] = PipelineSpec(recipe="sd15-bksdm-tiny", distilled=True)
    return found


KINDS: Final[Mapping[str, PipelineSpec]] = _kinds()


def kind_of(pipe: Any) -> PipelineSpec:
    """Raises ``UnknownName`` for another class, ``BadInput`` for one that overrides what a call runs, and for a
    ControlNet that is none or several."""
    name = pipeline_class(pipe).__name__
    if name not in KINDS:
        raise unknown_name("diffusers pipeline", type(pipe).__name__, KINDS, hint="(loaded by from_pretrained)")
    check_pipeline_code(pipe)
    control = unwrap_compiled(getattr(pipe, "controlnet", None))
    if control is not None and library_base(type(control)).__name__ != "ControlNetModel":
        raise BadInput(
            f"the pipeline has a {type(control).__name__}; allowed is one ControlNetModel",
            hint="give the pipeline a single ControlNet",
        )
    return KINDS[name]
