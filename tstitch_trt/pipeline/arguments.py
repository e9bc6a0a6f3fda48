"""The arguments of a diffusers pipeline, as ``tstitch_trt.accelerate``'s object takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

from tstitch_engines.checks import (
    Check,
    check_callable,
    check_items,
    check_number,
    check_switch,
    check_text,
    check_whole,
    read_items,
    read_pair,
    run_check,
    shown,
    taken_as_is,
)
from tstitch_engines.errors import BadInput, unknown_name
from tstitch_trt.pipeline.kinds import PipelineSpec
from tstitch_trt.pipeline.own_code import scheduler_class
from tstitch_trt.request.limits import MOST_IMAGES, check_prompt

__all__ = ["HEEDED", "OUTPUTS", "default_size", "read_arguments"]

OUTPUTS: Final = ("pil", "np", "pt", "latent")


def _texts(value: object, what: str) -> str | list[str]:
    """diffusers tells one from several by the type list."""
    if isinstance(value, str):
        return check_prompt(value, what)
    forms = "is a text or a list of texts"
    items = read_items(value, what, MOST_IMAGES, allowed=forms, example='"a red fox"')
    return [check_prompt(item, f"a text of {what}") for item in items]


def _pair(value: object, what: str) -> tuple[int, int]:
    first, second = read_pair(value, what, "are two whole numbers of pixels", "(512, 512)")
    return check_whole(first, what), check_whole(second, what)


def _timesteps(value: object, what: str) -> list[float]:
    items = read_items(value, what, 100_000, allowed="is a list of falling timesteps", example="[999, 499]")
    return [check_number(item, what, 0, 1e9) for item in items]


def _tensor(value: object, what: str) -> object:
    if not hasattr(value, "detach") or not getattr(value, "is_floating_point", bool)():
        raise BadInput(f"{what} is {shown(value)}; allowed is a tensor of floats", hint="give a torch.Tensor")
    return value


def _generator(value: object, what: str) -> object:
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not hasattr(one, "initial_seed"):
            raise BadInput(
                f"{what} is {shown(value)}; allowed is a torch.Generator, or a list of them",
                hint="e.g. generator=torch.Generator().manual_seed(0)",
            )
    return value


def _names(value: object, what: str) -> list[str]:
    empty = isinstance(value, list | tuple) and not value
    return [] if empty else list(check_items(value, what, partial(check_text, example="latents", most=100)))


_PIXELS: Final = partial(check_whole, low=1)
# The arguments of diffusers' pipelines that are heeded; any other may only have its default.
HEEDED: Final[Mapping[str, Check]] = {
    "prompt": _texts, "prompt_2": _texts, "negative_prompt": _texts, "negative_prompt_2": _texts,
    "image": taken_as_is, "mask_image": taken_as_is, "masked_image_latents": _tensor, "control_image": taken_as_is,
    "height": _PIXELS, "width": _PIXELS, "strength": partial(check_number, low=0, high=1),
    "num_inference_steps": partial(check_whole, low=1), "original_inference_steps": partial(check_whole, low=1),
    "timesteps": _timesteps, "denoising_start": partial(check_number, low=0, high=1),
    "denoising_end": partial(check_number, low=0, high=1), "guidance_scale": check_number,
    "guidance_rescale": partial(check_number, low=0, high=1),
    "num_images_per_prompt": partial(check_whole, low=1, high=MOST_IMAGES), "eta": check_number,
    "generator": _generator, "latents": _tensor, "prompt_embeds": _tensor, "negative_prompt_embeds": _tensor,
    "pooled_prompt_embeds": _tensor, "negative_pooled_prompt_embeds": _tensor,
    "output_type": partial(check_text, example="pil", most=100), "return_dict": check_switch, "original_size": _pair,
    "crops_coords_top_left": _pair, "target_size": _pair, "aesthetic_score": check_number,
    "negative_aesthetic_score": check_number, "clip_skip": partial(check_whole, high=100),
    "callback_on_step_end": check_callable, "callback_on_step_end_tensor_inputs": _names,
    "controlnet_conditioning_scale": check_number,
}  # fmt: skip


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
    if a.original_inference_steps is not None and scheduler_class(pipe.scheduler) != "LCMScheduler":
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
                f"argument of {name}",
                key,
                [*known, "fraction", "schedule", "rounding", "guidance", "latency_budget_ms", "timeout"],
            )
    try:
        bound = signature.bind(pipe, *args, **keywords)
    except TypeError as error:
        raise BadInput(f"the arguments do not fit {name}: {error}", hint="use keywords") from None
    bound.apply_defaults()
    values = dict.fromkeys(HEEDED)
    for key in known:
        value, default = bound.arguments[key], signature.parameters[key].default
        if key not in HEEDED and not _same(value, default):
            raise BadInput(
                f"{key} was given, which compiled engines can't honour; allowed is {default!r}",
                hint="leave it out, or call the pipeline itself: accelerated.pipe(...)",
            )
        values[key] = value
        if key in HEEDED and value is not None and value is not default:
            values[key] = run_check(HEEDED[key], value, key)
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
    except Exception as error:  # of foreign code, about foreign values
        name = type(pipe).__name__
        raise BadInput(f"{name} does not take this: {str(error)[:500]}", hint=f"see the arguments of {name}") from None


def _same(value: Any, default: Any) -> bool:
    """Whether nothing is asked for by this value."""
    if value is default or value is None or (isinstance(value, Mapping) and not value):
        return True
    return isinstance(value, bool | int | float | str | tuple | list) and value == default
