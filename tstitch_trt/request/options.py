"""What ``Runtime.sample`` is asked for, as one record, before any of it but the plan's options is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, TypedDict

from tstitch_trt.plan.options import PlanOptions, StepKeywords, unknown_keyword

__all__ = ["ImageKeywords", "SampleKeywords", "SampleOptions"]


class ImageKeywords(TypedDict, total=False):
    """The keywords of ``Runtime.sample`` that say what the images are to be; see ``SampleOptions``."""

    labels: int | str | Sequence[int | str] | None
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
    seed: int | None
    seeds: Sequence[int] | None
    latents: Any
    start_step: int | None
    image: Any
    strength: float | None
    mask: Any
    masked_image: Any
    control: Any
    control_scale: float | None


class SampleKeywords(ImageKeywords, StepKeywords, total=False):
    """All of a request: see ``SampleOptions`` and ``tstitch_trt.plan.options.PlanOptions``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOptions:
    """A request as it was asked for. ``plan``: how the images are drawn. ``None`` is "not said" in every field.

    For class bundles ``labels``: the class of each image as a number or name (``"sneaker"``, ``["sneaker", 3]``, or
    text as on the command line, ``"0-4,sneaker"``), cycled up to ``n``; all classes by default.

    For text bundles ``prompt``: one text or a list, cycled up to ``n``; ``negative_prompt`` likewise, for the
    unconditional half. In place of texts ``prompt_embeds`` ``[N,T,D]`` and, for guided steps,
    ``negative_prompt_embeds``; for members that take them ``pooled_prompt_embeds`` ``[N,E]`` and
    ``negative_pooled_prompt_embeds``. Each is one array, or a dict by member where their widths differ. SDXL's sizes
    ``original_size`` and ``target_size`` (height, width) and ``crop`` (top, left), in pixels, are those of an uncropped
    picture by default; its refiner takes ``aesthetic_score`` (6) and ``negative_aesthetic_score`` (2.5).

    ``height``, ``width``: of the picture in pixels (of the latent, where the bundle has no decoder that says how many
    pixels an element is); the bundle's own by default.

    ``n``: the number of images, at most 100,000 with 100 million steps and 10 million characters in all, and no more
    than fit into free memory; labels, texts and pictures go round, and more of them than images are refused. ``seeds``:
    one per image; otherwise image i has ``seed + i`` (``seed`` is 0 by default). ``latents``: unit Gaussian noise
    float32 ``[N,C,H,W]`` to start from in place of the seeds' own; with ``start_step`` k > 0 they are the state before
    step k, where a multistep solver starts again. They may be anything with ``__dlpack__`` or
    ``__cuda_array_interface__``, such as a torch tensor: on this runtime's GPU they are read where they lie (NaN in
    them is then found after the first step).

    ``image``: pictures to start from, uint8 ``[H,W,3]`` or ``[N,H,W,3]``, or latents, float ``[N,C,H,W]``. They are
    encoded, noised to the step that ``strength`` gives and drawn again from there: 1 runs all steps, 0.5 the later
    half; 0.8 by default, 1 with a mask. ``mask``: the part of them to paint anew, ``[H,W]`` or ``[N,H,W]``, true or
    above half white; the rest stays. ``masked_image``: for inpainting members, where ``image`` is latents: the latents
    of the picture with grey inside the mask. ``control``: pictures for the ControlNet, uint8 as ``image`` or float
    ``[N,3,H,W]`` in 0..1, and ``control_scale`` (1), the factor on what it adds.
    """

    labels: object = None
    prompt: object = None
    negative_prompt: object = None
    prompt_embeds: object = None
    negative_prompt_embeds: object = None
    pooled_prompt_embeds: object = None
    negative_pooled_prompt_embeds: object = None
    height: object = None
    width: object = None
    original_size: object = None
    crop: object = None
    target_size: object = None
    aesthetic_score: object = None
    negative_aesthetic_score: object = None
    n: object = None
    seed: object = None
    seeds: object = None
    latents: object = None
    start_step: object = None
    image: object = None
    strength: object = None
    mask: object = None
    masked_image: object = None
    control: object = None
    control_scale: object = None
    plan: PlanOptions = field(default_factory=PlanOptions)

    @staticmethod
    def from_keywords(keywords: Mapping[str, object]) -> SampleOptions:
        """Raises ``UnknownName`` for a keyword that ``sample`` does not have, and ``BadInput`` as ``PlanOptions``."""
        known = [*NAMES, *StepKeywords.__annotations__]
        for name in keywords:
            if name not in known:
                raise unknown_keyword("sample", name, [*known, *_RUNTIME])
        own = {name: value for name, value in keywords.items() if name in NAMES}
        plan = {name: value for name, value in keywords.items() if name not in NAMES}
        return SampleOptions(**own, plan=PlanOptions.from_keywords(plan))

    def given(self, names: Sequence[str]) -> list[str]:
        """Those of the fields ``names`` that were said."""
        return [name for name in names if getattr(self, name) is not None]


NAMES: Final = tuple(each.name for each in fields(SampleOptions) if each.name != "plan")
_RUNTIME: Final = (
    "callback",
    "decode",
    "output",
    "tile",
    "latency_budget_ms",
    "partial",
    "timeout",
)  # other keywords of ``sample``
