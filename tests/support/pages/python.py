"""docs/reference/python.md: the keywords of a request, by the typed dictionaries that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from support.compatibility.markdown import code, table
from tstitch_trt.plan.options import StepKeywords
from tstitch_trt.request.options import ImageKeywords

__all__ = ["image_keywords", "step_keywords"]

_IMAGES: Final[Mapping[str, str]] = {
    "labels": 'class bundles: numbers or names, or text as on the command line (`"0-4,sneaker"`), repeated up to `n`; '
    "all classes by default",
    "prompt": "text bundles: one text or a list, repeated up to `n`",
    "negative_prompt": "what not to draw, for steps with guidance; one text or a list",
    "prompt_embeds": "float `[N,T,D]` in place of `prompt`; a dict by member where their widths differ",
    "negative_prompt_embeds": "float `[N,T,D]` in place of `negative_prompt`",
    "pooled_prompt_embeds": "float `[N,E]`, for members that take them (SDXL)",
    "negative_pooled_prompt_embeds": "float `[N,E]`, likewise",
    "height": "of the picture in pixels; of the latent, where the bundle has no decoder",
    "width": "likewise",
    "original_size": "SDXL: height and width of the uncropped picture, in pixels; the picture's own by default",
    "crop": "SDXL: top and left of the crop, in pixels; `(0, 0)` by default",
    "target_size": "SDXL: height and width, in pixels; the picture's own by default",
    "aesthetic_score": "SDXL's refiner: 6 by default",
    "negative_aesthetic_score": "SDXL's refiner: 2.5 by default",
    "n": "number of images. At most 100,000, with 100 million steps and 10 million characters in all, and no more than "
    "fit into free memory. More labels, texts or pictures than images are refused",
    "seed": "image i has the seed `seed + i`; 0 by default",
    "seeds": "one seed for each image, in place of `seed`",
    "latents": "unit Gaussian noise float32 `[N,C,H,W]` to start from, in place of the seeds' own; with `start_step` "
    "the state before that step. Anything with `__dlpack__` or `__cuda_array_interface__`; on this runtime's GPU it is "
    "read where it lies",
    "start_step": "the step that `latents` enter at, from 0; a multistep solver starts again there",
    "image": "pictures to start from, uint8 `[H,W,3]` or `[N,H,W,3]`, or latents, float `[N,C,H,W]`",
    "strength": "the share of the steps that are run from `image`: 1 is all; 0.8 by default, 1 with a mask",
    "mask": "what to paint anew, `[H,W]` or `[N,H,W]`: true or above half is painted, the rest of `image` stays",
    "masked_image": "inpainting members, where `image` is latents: the latents of the picture with a grey mask",
    "control": "pictures for the ControlNet, uint8 as `image`, or float `[N,3,H,W]` in 0..1",
    "control_scale": "factor on what the ControlNet adds; 1 by default",
}
_STEPS: Final[Mapping[str, str]] = {
    "steps": "number of steps",
    "solver": "a name, or `tstitch_trt.solvers.SolverOptions`",
    "spacing": "where the timesteps lie",
    "sigmas": "place the steps by sigma: `karras` or `exponential`",
    "eta": "share of the noise that is drawn anew, 0 to 1",
    "variance": "of DDPM: `fixed-small`, `fixed-large` or `learned`",
    "solver_options": "further options of the solver by name",
    "timesteps": "explicit timesteps, falling, in place of `steps` and a spacing",
    "history": "whether a multistep solver keeps its estimates where the member changes (`keep`, the default) or "
    "starts again (`reset`)",
    "schedule": "the member of each step, as text or one name for each step",
    "fraction": "share of the steps on the first member; the rest on the last",
    "rounding": "how shares become steps; `paper` by default",
    "guidance": "classifier-free guidance scale (arXiv 2207.12598); 1 is none. One number, or numbers by member. `:g=` "
    "in the schedule goes first. A member that was distilled for a scale takes it as an input",
    "guidance_rescale": "arXiv 2305.08891, section 3.4; 0, the default, is none",
    "guidance_interval": "guide the steps `first <= i < stop` only",
    "guided_channels": "guide the first channels only",
}


def image_keywords() -> str:
    return _table(ImageKeywords.__annotations__, _IMAGES)


def step_keywords() -> str:
    return _table(StepKeywords.__annotations__, _STEPS)


def _table(hints: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    assert hints.keys() == meanings.keys()
    types = {name: str(hint.__forward_arg__).removesuffix(" | None") for name, hint in hints.items()}
    rows = [[code(name), "array" if types[name] == "Any" else code(types[name]), meanings[name]] for name in hints]
    return table(("keyword", "type", "meaning"), rows)
