"""The arguments of a diffusers pipeline, as ``tstitch_trt.accelerate``'s object takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Final

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.pipeline.kinds import PipelineSpec

__all__ = ["OUTPUTS", "default_size", "read_arguments"]

OUTPUTS: Final = ("pil", "np", "pt", "latent")

# The arguments of diffusers' pipelines that are heeded; any other may only have its default.
_HEEDED: Final = (
    "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "image", "mask_image", "masked_image_latents",
    "control_image", "height", "width", "strength", "num_inference_steps", "original_inference_steps", "timesteps",
    "denoising_start", "denoising_end", "guidance_scale", "guidance_rescale", "num_images_per_prompt", "eta",
    "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds", "output_type", "return_dict", "original_size", "crops_coords_top_left",
    "target_size", "aesthetic_score", "negative_aesthetic_score", "clip_skip", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "controlnet_conditioning_scale"
)  # fmt: skip


def read_arguments(
    pipe: Any, kind: PipelineSpec, args: tuple[Any, ...], keywords: Mapping[str, Any]
) -> SimpleNamespace:
    """Every argument that is heeded, by the name it has in diffusers; ``None`` where the pipeline has none such.

    Raises ``UnknownName`` for one that the pipeline does not have, ``BadInput`` for one that engines can't honour and
    for all that the pipeline's own checks refuse.
    """
    a = SimpleNamespace(**_bound(pipe, args, keywords))
    if a.output_type not in OUTPUTS:
        raise unknown_name("output_type", str(a.output_type), OUTPUTS)
    if a.callback_on_step_end is not None:
        inputs = getattr(a.callback_on_step_end, "tensor_inputs", a.callback_on_step_end_tensor_inputs)
        if set(inputs) - {"latents"}:
            raise BadInput(
                f"callback_on_step_end_tensor_inputs is {list(inputs)}; allowed is ['latents']: the others are in "
                "the engines' memory",
                hint="leave it out",
            )
    if (a.prompt is None) == (a.prompt_embeds is None):
        raise BadInput("give either prompt or prompt_embeds", hint='e.g. prompt="a red fox"')
    if kind.xl and a.prompt_embeds is not None and a.pooled_prompt_embeds is None:
        raise BadInput(
            "prompt_embeds were given without pooled_prompt_embeds", hint="pipe.encode_prompt(...) returns both"
        )
    if kind.control is not None and getattr(a, kind.control) is None:
        raise BadInput("the control picture is missing", hint=f"give the ControlNet its picture: {kind.control}=...")
    if kind.starts and a.image is None:
        raise BadInput("image is missing", hint=f"{type(pipe).__name__} starts from a picture: image=...")
    if kind.masked and a.mask_image is None:
        raise BadInput("mask_image is missing", hint="it is what to paint anew: mask_image=...")
    if a.original_inference_steps is not None and type(pipe.scheduler).__name__ != "LCMScheduler":
        raise BadInput(
            f"original_inference_steps was given, and the scheduler is a {type(pipe.scheduler).__name__}",
            hint="leave it out, or set an LCMScheduler",
        )
    _check_as_diffusers(pipe, kind, a)
    return a


def default_size(pipe: Any, kind: PipelineSpec, a: SimpleNamespace) -> tuple[int | None, int | None]:
    """Height and width in pixels as the pipeline finds them; ``None``: those of the pictures it is given."""
    if (kind.starts and not kind.masked) or kind.control == "image":
        return a.height, a.width
    side = pipe.unet.config.sample_size
    own = [side, side] if isinstance(side, int) else list(side)
    factor = pipe.vae_scale_factor
    if not kind.xl and not (a.height and a.width):
        return own[0] * factor, own[1] * factor
    return a.height or own[0] * factor, a.width or own[1] * factor


def _bound(pipe: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    name = type(pipe).__name__
    signature = inspect.signature(type(pipe).__call__)
    known = [key for key in signature.parameters if key not in ("self", "kwargs")]
    for key in keywords:
        if key not in known:
            raise unknown_name(
                f"argument of {name}", key, [*known, "fraction", "schedule", "latency_budget_ms", "timeout"]
            )
    try:
        bound = signature.bind(pipe, *args, **keywords)
    except TypeError as error:
        raise BadInput(f"the arguments do not fit {name}: {error}", hint="use keywords") from None
    bound.apply_defaults()
    values = dict.fromkeys(_HEEDED)
    for key in known:
        value, default = bound.arguments[key], signature.parameters[key].default
        if key not in _HEEDED and not _same(value, default):
            raise BadInput(
                f"{key} was given, which compiled engines can't honour; allowed is {default!r}",
                hint="leave it out, or call the pipeline itself: accelerated.pipe(...)",
            )
        values[key] = value
    return values


def _check_as_diffusers(pipe: Any, kind: PipelineSpec, a: SimpleNamespace) -> None:
    """What the pipeline checks of its arguments itself, by its own code."""
    height, width = default_size(pipe, kind, a)
    given = {**vars(a), "height": height, "width": width, "callback_on_step_end_tensor_inputs": None}
    if kind.control is not None:
        given["image"] = given[kind.control]
        for name in ("control_guidance_start", "control_guidance_end"):  # the pipelines make lists of them before
            if not isinstance(given.get(name), list):
                given[name] = [given.get(name)]
    parameters = inspect.signature(pipe.check_inputs).parameters
    try:
        pipe.check_inputs(**{name: given.get(name) for name in parameters})
    except (ValueError, TypeError) as error:
        name = type(pipe).__name__
        raise BadInput(f"{name} does not take this: {error}", hint=f"see the arguments of {name}") from None


def _same(value: Any, default: Any) -> bool:
    """Whether nothing is asked for by this value."""
    if value is default or value is None or (isinstance(value, Mapping) and not value):
        return True
    return isinstance(value, bool | int | float | str | tuple | list) and value == default
