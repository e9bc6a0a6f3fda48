"""The keywords of ``Runtime.sample``: what is asked for, before any of it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import unknown_name
from tstitch_trt.plan.options import StepKeywords

__all__ = ["PictureWishes", "Wishes", "asked_steps", "split_wishes"]


class PictureWishes(TypedDict, total=False):
    """What the pictures are to be.

    Of a class bundle ``labels``: the class of each image (cycled up to ``n``; all classes when left out).

    Of a text bundle ``prompt``: one text, or a list that goes round; ``negative_prompt`` likewise, for the
    unconditional half. In place of texts ``prompt_embeds`` ``[N,T,D]`` and, for guided steps,
    ``negative_prompt_embeds``; for members that want them ``pooled_prompt_embeds`` ``[N,E]`` and
    ``negative_pooled_prompt_embeds``. Each is one array, or a dict by member where their widths differ. SDXL's sizes
    ``original_size`` and ``target_size`` (height, width) and ``crop`` (top, left), in pixels, are by default those of
    an uncropped picture; its refiner takes ``aesthetic_score`` (6) and ``negative_aesthetic_score`` (2.5).

    ``height``, ``width``: of the picture in pixels (of the latent, where the bundle has no decoder that says how many
    pixels an element is); the bundle's own by default.

    ``n``: how many images. ``seeds``: one per image; otherwise image i has ``seed + i``. ``latents``: unit Gaussian
    noise float32 ``[N,C,H,W]`` to start from in place of the seeds' own; with ``start_step`` k > 0 they are the state
    before step k instead. They may be anything with ``__dlpack__`` or ``__cuda_array_interface__``, such as a torch
    tensor: on this runtime's GPU they are read where they lie (a NaN in them is then found after the first step).

    ``image``: pictures to start from, uint8 ``[H,W,3]`` or ``[N,H,W,3]``, or latents, float ``[N,C,H,W]``. They are
    encoded, noised to the step that ``strength`` says and drawn again from there: 1 runs all steps, 0.5 the later half.
    ``mask``: what of them to paint anew, ``[H,W]`` or ``[N,H,W]``, true or above half white; the rest stays.
    ``masked_image``: for members that are told what lies outside the mask, where ``image`` is latents: those of the
    picture with grey inside the mask. ``control``: pictures for the ControlNet, uint8 as ``image`` or float
    ``[N,3,H,W]`` in 0..1, and ``control_scale``, how much it has to say.
    """

    labels: int | Sequence[int] | None
    prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    pooled_prompt_embeds: Any
    negative_pooled_prompt_embeds: Any
    height: int | None
    width: int | None
    original_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    n: int | None
    seed: int
    seeds: Sequence[int] | None
    latents: Any
    start_step: int
    image: Any
    strength: float | None
    mask: Any
    masked_image: Any
    control: Any
    control_scale: float | None


class Wishes(PictureWishes, StepKeywords, total=False):
    """All of a request."""


def split_wishes(wishes: Mapping[str, Any]) -> tuple[PictureWishes, dict[str, Any]]:
    """What the pictures are to be, and the keywords for ``make_plan``. Raises ``UnknownName``."""
    pictures: PictureWishes = {}
    plan: dict[str, Any] = {}
    settings = list(StepKeywords.__annotations__)
    for name, value in wishes.items():
        if name in PictureWishes.__annotations__:
            pictures[name] = value  # type: ignore[literal-required]
        elif name in settings:
            plan[name] = value
        else:
            raise unknown_name("keyword of sample", name, [*PictureWishes.__annotations__, *settings])
    return pictures, plan


def asked_steps(manifest: Manifest, plan: Mapping[str, Any]) -> int:
    """Steps as the keywords for ``make_plan`` ask for them: a solver may make one evaluation more."""
    if plan.get("timesteps") is not None:
        return len(plan["timesteps"])
    return int(plan.get("steps") or manifest.defaults.steps)
