"""A request as one typed value. Whatever can be refused without running an engine is refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.checks import (
    check_number,
    check_whole,
    plain_number,
    read_items,
    read_mapping,
    read_pair,
    shown,
)
from tstitch_engines.device.base import Buffer
from tstitch_engines.errors import BadInput, Unavailable, unknown_name
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.arrays import (
    ForeignLatents,
    check_room,
    locate_latents,
    read_array,
    read_control,
    read_embedding,
    read_image,
    read_latents,
    read_masks,
    to_float32,
)
from tstitch_trt.request.controlnet import CONTROLNET
from tstitch_trt.request.labels import read_labels
from tstitch_trt.request.limits import MOST_IMAGES, Limits, check_prompt
from tstitch_trt.request.options import SampleOptions

__all__ = ["InitOptions", "MicroConditioning", "ParsedRequest", "count_images", "parse_request"]

Array = NDArray[np.float32]

_TEXTS = ("prompt", "negative_prompt")
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_SIZES = ("original_size", "crop", "target_size")
_SCORES = ("aesthetic_score", "negative_aesthetic_score")

_SEED_LIMIT: Final = 2**64
_MOST_TEXT: Final = 10_000_000  # characters of all prompts together
_MOST_STEPS: Final = 100_000_000  # of all images together; 50,000 images of 250 steps, as FID takes, are an eighth


@dataclass(frozen=True)
class MicroConditioning:
    """SDXL's sizes in pixels, ``None`` those of an uncropped picture, and its refiner's scores for both halves."""

    original_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    target_size: tuple[int, int] | None
    scores: tuple[float, float]


@dataclass(frozen=True, eq=False)
class InitOptions:
    """``image``: uint8 pictures ``[K,H,W,C]`` or float32 latents ``[K,C,h,w]``. ``mask`` float32 ``[K,1,H,W]``.

    ``masked_image``: latents float32 ``[K,C,h,w]``. ``strength``: the share of the steps that run.
    """

    image: NDArray[np.uint8] | Array
    mask: Array | None
    masked_image: Array | None
    strength: float

    def first_step(self, steps: int) -> int:
        """The first step that runs, as diffusers counts it. Raises ``BadInput`` where no step is left."""
        running = min(int(steps * self.strength), steps)
        if running < 1:
            raise BadInput(
                f"strength {self.strength:g} of {steps} steps leaves no step to run",
                hint=f"use at least {1 / steps:.2g}, or more steps",
            )
        return steps - running


@dataclass(frozen=True, eq=False, kw_only=True)
class ParsedRequest:
    """``seeds``: one per image, and so are ``labels`` of a class bundle. ``size``: height and width of the latents.

    ``prompts`` and ``negative_prompts`` are cycled; without prompts a text bundle has ``embeddings``: by keyword and
    member, float32. ``latents`` float32 ``[N,C,h,w]``, the state before ``start_step`` or unit noise;
    those in the memory of a device are a buffer once the runtime has borrowed them. ``control``
    float32 ``[K,3,H,W]`` in [0, 1].
    """

    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    embeddings: Mapping[str, Mapping[str, Array]]
    micro: MicroConditioning
    seeds: tuple[int, ...]
    size: tuple[int, int]
    latents: Array | Buffer | ForeignLatents | None
    start_step: int
    init: InitOptions | None
    control: Array | None
    control_scale: float

    @property
    def n(self) -> int:
        return len(self.seeds)

    def first_step(self, steps: int) -> int:
        """The first step that runs of a trajectory of ``steps``. Raises ``BadInput`` where no step is left."""
        return self.start_step if self.init is None else self.init.first_step(steps)

    def check(self, manifest: Manifest, plan: Plan, *, chosen: bool = False) -> None:
        """Raises ``BadInput`` for what does not go with the plan.

        ``chosen``: its schedule is a budget's, so that the request can't know whether a distilled member runs alone.
        """
        if not any(plan.guided) and not (chosen and plan.embedded):
            negative = {key for key in self.embeddings if key.startswith("negative")}
            negative |= set() if self.negative_prompts is None else {"negative_prompt"}
            if negative:
                told = len(plan.embedded) == len(plan.schedule.counts)
                why = "the members that run take their scale as an input" if told else "no step of this plan is guided"
                guide = "" if told else "add guidance, e.g. guidance=7.5 (--guidance 7.5), or "
                raise BadInput(f"{min(negative)} has no effect: {why}", hint=f"{guide}leave it out")
        for name in dict.fromkeys(plan.schedule.names):
            if manifest.members[name].inpaints and (self.init is None or self.init.mask is None):
                raise BadInput(
                    f"member {name!r} paints into a picture, and there is no picture or no mask",
                    hint="add image= and mask= (--image FILE --mask FILE)",
                )
        if self.control is not None and CONTROLNET not in manifest.parts:
            raise Unavailable(
                f"the bundle {manifest.name!r} has no ControlNet, so it can't follow a control picture",
                hint="build it with one: --part controlnet=FOLDER",
            )
        if self.control is not None and not any(manifest.members[name].controlled for name in plan.schedule.names):
            raise BadInput(
                "a control picture was given, and none of the members that run takes control: "
                + ", ".join(dict.fromkeys(plan.schedule.names)),
                hint="build them with the option controlled, or choose a schedule with one that is",
            )
        if self.n * plan.steps > _MOST_STEPS:
            raise BadInput(
                f"{self.n:,} images of {plan.steps:,} steps are {self.n * plan.steps:,} steps; allowed are "
                f"{_MOST_STEPS:,} in one request",
                hint="ask for fewer images at once (n=), or fewer steps",
            )


def parse_request(manifest: Manifest, limits: Limits, options: SampleOptions) -> ParsedRequest:
    """Runs no engine. Raises ``BadInput`` and its kinds for all that can't be right, whatever its type."""
    _check_kind(manifest, options)
    if options.image is None:
        for name in options.given(("strength", "mask", "masked_image")):
            raise BadInput(f"{name} was given without a picture", hint="add the picture: image= (--image FILE)")
    channels = manifest.latent.channels if manifest.decoder.kind == "pixel" else 3
    image = None if options.image is None else read_image(options.image, channels)
    control, control_scale = _control(options)
    latents = None if options.latents is None else locate_latents(options.latents)
    size = _size(manifest, limits, options, image, control, latents)
    shape = (manifest.latent.channels, *size)
    prompts = () if options.prompt is None else _texts(options.prompt, "prompt")
    negative = None if options.negative_prompt is None else _texts(options.negative_prompt, "negative_prompt")
    embeddings = _embeddings(manifest, options)
    state = read_latents(latents, shape) if isinstance(latents, np.ndarray) else latents
    init = None if image is None else _init(manifest, options, image, shape, state)
    rows: dict[str, Sized | None] = {"prompt": prompts or None, "negative_prompt": negative, "control": control}
    rows |= {key: max(arrays.values(), key=len) for key, arrays in embeddings.items()}
    rows |= {} if init is None else {"image": init.image, "mask": init.mask, "masked_image": init.masked_image}
    cycled = {name: len(given) for name, given in rows.items() if given is not None}
    labels, seeds = count_images(manifest, options, latents, cycled)
    _check_memory(manifest, len(seeds), size, starts=init is not None)
    return ParsedRequest(
        labels=labels,
        prompts=prompts,
        negative_prompts=negative,
        embeddings=embeddings,
        micro=_micro(options),
        seeds=seeds,
        size=size,
        latents=state,
        start_step=_start_step(options),
        init=init,
        control=control,
        control_scale=control_scale,
    )


def _check_kind(manifest: Manifest, options: SampleOptions) -> None:
    """Raises ``BadInput`` for options that are not for bundles of this kind, and for none that say what to draw."""
    if manifest.conditioning.kind != "text":
        for name in options.given((*_TEXTS, *_EMBEDS, *_SIZES, *_SCORES)):
            raise BadInput(
                f"{name} was given, and the bundle {manifest.name!r} draws classes: it understands no text",
                hint=f"ask for classes: labels=[0, 1] (--labels 0-{manifest.conditioning.classes - 1})",
            )
        return
    if options.labels is not None:
        raise BadInput(
            f"labels were given, and the bundle {manifest.name!r} draws from text: it has no classes",
            hint='ask with prompt="..." (--prompt TEXT)',
        )
    both = options.given(("prompt", "prompt_embeds"))
    if len(both) != 1:
        raise BadInput(
            "both prompt and prompt_embeds were given" if both else "nothing says what to draw",
            hint='give prompt="..." (--prompt TEXT), or prompt_embeds= (--prompt-embeds FILE.npz)',
        )
    kinds = {member.text.time_ids for member in manifest.members.values() if member.text is not None}
    for names, fits in ((_SIZES, bool(kinds & {"sizes", "aesthetic"})), (_SCORES, "aesthetic" in kinds)):
        if not fits and (extra := sorted(options.given(names))):
            raise BadInput(f"{extra[0]} was given, and no member of this bundle takes it", hint="leave it out")


def _check_memory(manifest: Manifest, count: int, size: tuple[int, int], *, starts: bool) -> None:
    """The latents of all images and the pictures made of them are kept until the request is done. ``starts``: so are
    the latents and the noise that a trajectory from a picture is started from."""
    latents = 4 * manifest.latent.channels * size[0] * size[1]
    height, width = (side * manifest.decoder.factor for side in size)
    pictures = 0 if manifest.decoder.kind == "none" else 3 * height * width
    kept = latents * (4 if starts else 1) + pictures
    check_room(count * kept, f"a request for {count:,} images of {width}x{height} pixels")


# --- what to draw


def _texts(value: object, what: str) -> tuple[str, ...]:
    example = "a red fox"
    if isinstance(value, str):
        return (check_prompt(value, what),)
    texts = read_items(value, what, MOST_IMAGES, allowed="is a text or a list of texts", example=f'"{example}"')
    found = tuple(check_prompt(text, f"a text of {what}") for text in texts)
    total = sum(map(len, found))
    if total > _MOST_TEXT:
        raise BadInput(
            f"{what} has {total:,} characters in all; allowed are {_MOST_TEXT:,} in one request",
            hint="ask for the images in several requests",
        )
    return found


def _embeddings(manifest: Manifest, options: SampleOptions) -> Mapping[str, Mapping[str, Array]]:
    found: dict[str, Mapping[str, Array]] = {}
    names = [name for name, member in manifest.members.items() if member.text is not None]
    for key in options.given(_EMBEDS):
        value, pooled = getattr(options, key), "pooled" in key
        if not isinstance(value, Mapping):
            found[key] = dict.fromkeys(names, read_embedding(value, key, names[0], pooled=pooled))
            continue
        arrays = read_mapping(value, key, example="{'base': array, 'refiner': array}")
        for name in arrays:
            if name not in manifest.members:
                raise unknown_name("member", name, manifest.members, hint=f"(in {key})")
        found[key] = {name: read_embedding(array, key, name, pooled=pooled) for name, array in arrays.items()}
        if not found[key]:
            raise BadInput(f"{key} is an empty dict", hint="give an array for each member, or one for all")
    return found


def _micro(options: SampleOptions) -> MicroConditioning:
    positive, negative = (
        default if getattr(options, key) is None else check_number(getattr(options, key), key, -1e6, 1e6)
        for key, default in zip(_SCORES, (6.0, 2.5), strict=True)
    )
    original, crop, target = (
        None if getattr(options, key) is None else _pair(getattr(options, key), key, least)
        for key, least in zip(_SIZES, (1, 0, 1), strict=True)
    )
    return MicroConditioning(original, crop, target, (positive, negative))


def _pair(value: object, what: str, least: int) -> tuple[int, int]:
    example = "(512, 512), height and width" if least else "(0, 0), top and left"
    first, second = read_pair(value, what, f"are two whole numbers of pixels from {least} on", example)
    return check_whole(first, what, least), check_whole(second, what, least)


# --- how many


def count_images(
    manifest: Manifest,
    options: SampleOptions,
    latents: NDArray[np.generic] | ForeignLatents | None,
    cycled: dict[str, int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The labels of a class bundle, and the seeds, both one per image. ``cycled``: rows of what goes round.

    Raises ``BadInput`` where they don't agree on the number of images.
    """
    wanted: list[int] = []
    classes = manifest.conditioning
    if classes.kind == "class":
        wanted = list(range(classes.classes)) if options.labels is None else read_labels(options.labels, classes)
        cycled = cycled if options.labels is None else {"labels": len(wanted), **cycled}
    if options.seed is not None and options.seeds is not None:
        raise BadInput(
            f"both seed {shown(options.seed)} and seeds {shown(options.seeds)} were given",
            hint="give the first image's seed= (--seed), or seeds= one per image (--seeds)",
        )
    seeds = None if options.seeds is None else _seed_list(options.seeds)
    given = {} if options.n is None else {"n": check_whole(options.n, "n", high=MOST_IMAGES)}
    given |= {} if seeds is None else {"seeds": len(seeds)}
    given |= {} if latents is None or not latents.shape else {"latents": int(latents.shape[0])}
    count = next(iter(given.values()), max(cycled.values(), default=1))
    if len(set(given.values())) > 1:
        raise BadInput(
            "these do not agree on the number of images: " + ", ".join(f"{k}: {v}" for k, v in given.items()),
            hint="give one seed and one latent per image, or leave n out",
        )
    if not 1 <= count <= MOST_IMAGES:
        raise BadInput(
            f"{count} images in one request" if count else "0 images: nothing to draw",
            hint=f"ask for 1 to {MOST_IMAGES} images, e.g. n=1",
        )
    for name, rows in cycled.items():
        if rows > count:
            counted = next(iter(given))
            raise BadInput(
                f"{name} has {rows} entries and {counted} asks for {count} images: some would be left out",
                hint=f"give at most {count} in {name}, or make {counted} {rows}",
            )
    labels = tuple(wanted[i % len(wanted)] for i in range(count)) if wanted else ()
    if seeds is not None:
        return labels, seeds
    first = 0 if options.seed is None else _seed(options.seed)
    _seed(first + count - 1)
    return labels, tuple(range(first, first + count))


def _seed_list(value: object) -> tuple[int, ...]:
    forms = f"is a list of at most {MOST_IMAGES:,} whole numbers, one per image"
    items = read_items(value, "seeds", MOST_IMAGES, allowed=forms, example="[0, 1], or seed=0 for the first image")
    return tuple(_seed(seed) for seed in items)


def _seed(value: object) -> int:
    seed = plain_number(value)
    if not isinstance(seed, int) or not 0 <= seed < _SEED_LIMIT:
        raise BadInput(
            f"seed {shown(value)} is out of range; allowed are whole numbers from 0 to 2**64 - 1",
            hint="e.g. seed=0 (--seed 0)",
        )
    return seed


# --- how large


def _size(
    manifest: Manifest,
    limits: Limits,
    options: SampleOptions,
    image: NDArray[np.uint8] | Array | None,
    control: Array | None,
    latents: NDArray[np.generic] | ForeignLatents | None,
) -> tuple[int, int]:
    """Height and width of the latent: as asked for, else those of what was given, else the bundle's own."""
    factor = manifest.decoder.factor
    found: dict[str, tuple[int, int]] = {}
    if image is not None:
        of_latents = image.dtype.kind == "f"
        rows, columns = image.shape[2:] if of_latents else image.shape[1:3]
        found["image"] = (rows * factor, columns * factor) if of_latents else (rows, columns)
    if control is not None:
        found["control"] = (control.shape[2], control.shape[3])
    height, width = options.height, options.width
    dynamic = any(side.min != side.max for sides in limits.sides.values() for side in sides.values())
    if found:
        first = next(iter(found.values()))
        height, width = first[0] if height is None else height, first[1] if width is None else width
    elif latents is not None and len(latents.shape) == 4 and height is None and width is None and dynamic:
        height, width = int(latents.shape[2]) * factor, int(latents.shape[3]) * factor
    size = limits.latent_size(height, width)
    pixels = (size[0] * factor, size[1] * factor)
    for what, given in found.items():
        if given != pixels:
            raise BadInput(
                f"{what} is {given[1]}x{given[0]} pixels and the picture is to be {pixels[1]}x{pixels[0]} (width x "
                "height); both must be equal",
                hint=f"resize {what}, or ask for its size: width={given[1]}, height={given[0]}",
            )
    return size


# --- what to start from


def _start_step(options: SampleOptions) -> int:
    start = 0 if options.start_step is None else check_whole(options.start_step, "start_step")
    if start and options.image is not None:
        raise BadInput(
            f"both image and start_step {start} say where to start",
            hint="with a picture strength says how much of the trajectory runs (--strength)",
        )
    if start and options.latents is None:
        raise BadInput(
            f"start_step {start} without latents: there is no state to start from",
            hint="pass latents= with the state before that step, or start_step=0",
        )
    return start


def _init(
    manifest: Manifest,
    options: SampleOptions,
    image: NDArray[np.uint8] | Array,
    shape: tuple[int, ...],
    latents: Array | ForeignLatents | None,
) -> InitOptions:
    """``shape``: of one image's latent. ``latents``: the noise to mix in, if it was given."""
    usual = 0.8 if options.mask is None else 1.0
    strength = usual if options.strength is None else check_number(options.strength, "strength", 0, 1)
    if not strength:
        raise BadInput(
            "strength is 0; allowed is above 0 up to 1",
            hint="0.3 changes little, 0.8 much; e.g. --strength 0.6",
        )
    factor = manifest.decoder.factor
    mask = None if options.mask is None else read_masks(options.mask, size=(shape[1] * factor, shape[2] * factor))
    if image.dtype.kind == "f" and image.shape[1:] != shape:
        raise BadInput(
            f"image is float32{list(image.shape)}, taken as latents; needed is [N, {', '.join(map(str, shape))}]",
            hint="give pictures as uint8 [N,H,W,3]",
        )
    inpainting = any(member.inpaints for member in manifest.members.values())
    if options.masked_image is not None and not (inpainting and mask is not None):
        why, fix = "no mask", "add mask="
        if not inpainting:
            why = "no member of this bundle takes it"
            fix = "leave it out: the picture outside the mask is put back after each step"
        raise BadInput(f"masked_image was given, and {why}", hint=fix)
    masked = None
    if options.masked_image is not None:
        given = read_array(options.masked_image, "masked_image")
        masked = to_float32(given) if given.dtype.kind == "f" and given.size else None
        if masked is None or masked.ndim != 4 or masked.shape[1:] != shape or not np.isfinite(masked).all():
            raise BadInput(
                f"masked_image is {given.dtype}{list(given.shape)}; needed are finite latents, float32 "
                f"[N, {', '.join(map(str, shape))}]",
                hint="encode the picture with grey where it is painted anew, or leave it out and give image= as uint8",
            )
    elif mask is not None and inpainting and image.dtype.kind == "f":
        raise BadInput(
            "image is latents, and a member that paints into a picture needs the picture itself",
            hint="give image= as uint8 [N,H,W,3], or masked_image= too: latents with grey where it is painted anew",
        )
    if isinstance(latents, ForeignLatents):
        raise BadInput("latents on the device can't be mixed with a picture", hint="pass them as a numpy array")
    return InitOptions(image, mask, masked, strength)


def _control(options: SampleOptions) -> tuple[Array | None, float]:
    """The control pictures and their scale."""
    scale = 1.0 if options.control_scale is None else check_number(options.control_scale, "control_scale", -1e6, 1e6)
    if options.control_scale is not None and options.control is None:
        raise BadInput("control_scale was given without a control picture", hint="add control= (--control FILE)")
    return None if options.control is None else read_control(options.control), scale
