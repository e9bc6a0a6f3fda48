"""What a message asks for, as options of the engine."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.bundle.manifest import Conditioning, Manifest
from tstitch_engines.checks import check_number, check_whole
from tstitch_engines.errors import BadInput, nearest
from tstitch_trt.request.labels import read_labels
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.serve.http.errors import ApiError
from tstitch_trt.serve.http.limits import HttpLimits
from tstitch_trt.serve.http.messages import FORMATS, EditForm, EditRequest, Format, ImagesRequest
from tstitch_trt.serve.http.pictures import decode_mask, decode_picture

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["Output", "Pictures", "accepted_formats", "check_limits", "choose_model", "output_of", "sample_options"]

_WEIGHT: Final = re.compile(r"[01](\.[0-9]{0,3})?")
_SCALE: Final = re.compile(r":g=([^,]*)")
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_SEEDS: Final = 2**32  # a random one is below: short enough to be typed again
_AS_ASKED: Final = ("steps", "solver", "fraction", "rounding", "schedule", "guidance", "negative_prompt")


@dataclass(frozen=True)
class Pictures:
    """The files of an edit."""

    image: bytes
    mask: bytes | None


@dataclass(frozen=True)
class Output:
    """What the answer is to be. ``binary``: the picture alone. ``identifier``: of a user, repeated."""

    form: Format
    quality: int
    binary: bool
    stream: bool
    previews: int
    identifier: str | None


def check_limits(message: ImagesRequest, limits: HttpLimits) -> None:
    """Raises ``BadInput`` for more than the operator allows."""
    for name in ("prompt", "negative_prompt"):
        text = getattr(message, name)
        if text is not None and len(text) > limits.prompt:
            raise BadInput(
                f"{name} has {len(text):,} characters; allowed are {limits.prompt:,}", hint=f"shorten {name}"
            )
    for name, low, high in (("n", 1, limits.images), ("steps", 1, limits.steps),
                            ("priority", -limits.priority, limits.priority)):  # fmt: skip
        if getattr(message, name) is not None:
            check_whole(getattr(message, name), name, low, high, example=max(low, min(high, 1)))
    for name, most in (("guidance", limits.guidance), ("latency_budget_ms", limits.latency_budget_ms)):
        if getattr(message, name) is not None:
            check_number(getattr(message, name), name, 0, most)
    for text in _SCALE.findall(message.schedule or ""):
        if _NUMBER.fullmatch(text):  # what is no number the schedule itself refuses
            check_number(float(text), "schedule: a guidance scale", 0, limits.guidance)


def accepted_formats(accept: str) -> list[Format]:
    """The formats that a header Accept takes before JSON, the best first. Empty: the client takes JSON."""
    found: list[tuple[float, str]] = []
    for part in accept.split(",")[:50]:
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        weight = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        found.append((float(weight) if _WEIGHT.fullmatch(weight) else 0.0, kind))
    json = max((weight for weight, kind in found if kind in ("application/json", "application/*")), default=0.0)
    ranked = sorted((pair for pair in found if pair[0] > 0 and pair[0] >= json), key=lambda pair: -pair[0])
    formats = (form for _, kind in ranked for form in FORMATS if kind in (f"image/{form}", "image/*"))
    return list(dict.fromkeys(formats))


def output_of(message: ImagesRequest, accept: str) -> Output:
    """``accept``: the header. Raises ``ApiError`` for what does not go together."""
    stream = bool(message.stream)
    if message.partial_images and not stream:
        raise ApiError(400, "partial_images without stream\nhint: add stream=true", param="partial_images")
    formats = accepted_formats(accept)
    if formats and (stream or (message.n or 1) != 1):
        raise ApiError(
            400, f"the header Accept asks for the picture itself, and the body for "
            f"{'a stream' if stream else f'{message.n} images'}\nhint: accept application/json, or ask for one image",
            param="stream" if stream else "n",
        )  # fmt: skip
    form: Format = message.output_format or (formats[0] if formats else "png")
    if formats and form not in formats:
        raise ApiError(
            400, f"output_format is {form}, and the header Accept takes {', '.join(formats)}\nhint: leave "
            "output_format out", param="output_format",
        )  # fmt: skip
    quality = 100 if message.output_compression is None else message.output_compression
    if form == "png" and quality != 100:
        raise ApiError(
            400, f"output_compression is {quality} for png, which holds every pixel as it is\nhint: add "
            "output_format=jpeg or webp", param="output_compression",
        )  # fmt: skip
    identifier = message.safety_identifier or message.user
    return Output(form, quality, bool(formats), stream, message.partial_images or 0, identifier)


def choose_model(asked: str | None, known: tuple[str, ...]) -> str:
    """Raises ``ApiError`` 404 for one that is not served."""
    if asked is None:
        return known[0]
    if asked not in known:
        close = nearest(asked[:100], known)
        fix = f"did you mean {close!r}?" if close else f"use one of: {', '.join(known)}"
        raise ApiError(
            404, f"the model {asked[:80]!r} does not exist here\nhint: {fix}", param="model", code="model_not_found"
        )
    return asked


def sample_options(
    message: ImagesRequest, pictures: Pictures | None, runtime: Runtime, limits: HttpLimits
) -> SampleOptions:
    """Decodes the pictures, so not for an event loop. Raises ``BadInput`` and ``ApiError``."""
    manifest = runtime.manifest
    asked: dict[str, Any] = {name: getattr(message, name) for name in _AS_ASKED if getattr(message, name) is not None}
    asked |= _subject(message, manifest.conditioning, limits)
    asked["seed"] = secrets.randbelow(_SEEDS) if message.seed is None else message.seed
    size = _size(message.size)
    if size is not None:
        asked["height"], asked["width"] = size
        runtime.limits.latent_size(*size)  # before a picture is brought to it
    if pictures is not None:
        channels = manifest.latent.channels if manifest.decoder.kind == "pixel" else 3
        if channels not in (1, 3, 4):
            raise BadInput(f"the model {manifest.name!r} starts from no picture", hint="draw without one")
        image = decode_picture(pictures.image, channels=channels, size=size, most_pixels=limits.picture_pixels)
        size = (image.shape[0], image.shape[1])
        asked["image"] = image
        if pictures.mask is not None:
            asked["mask"] = decode_mask(
                pictures.mask, size=size, resize=message.size not in (None, "auto"), most_pixels=limits.picture_pixels
            )
        if isinstance(message, EditForm | EditRequest) and message.strength is not None:
            asked["strength"] = message.strength
    height, width = size or _own_size(manifest)
    if height * width > limits.pixels:
        raise BadInput(
            f"size {width}x{height} is {height * width:,} pixels; allowed are {limits.pixels:,}",
            hint="ask for a smaller size",
        )
    return SampleOptions.from_keywords(asked)


def _own_size(manifest: Manifest) -> tuple[int, int]:
    factor = manifest.decoder.factor
    return manifest.latent.height * factor, manifest.latent.width * factor


def _size(text: str | None) -> tuple[int, int] | None:
    """Height and width; ``None``: the model's own."""
    if text is None or text == "auto":
        return None
    width, _, height = text.partition("x")
    return int(height), int(width)


def _subject(message: ImagesRequest, classes: Conditioning, limits: HttpLimits) -> dict[str, Any]:
    """What is to be drawn, and how many times."""
    if classes.kind == "text":
        if message.class_labels is not None:
            raise BadInput("class_labels of a model of texts", hint="say what to draw in prompt")
        if message.prompt is None:
            raise ApiError(
                400, "prompt is missing\nhint: say what to draw", param="prompt", code="missing_required_parameter"
            )
        return {"prompt": message.prompt, "n": message.n or 1}
    labels: list[int] | None = None
    if message.class_labels is not None:
        if message.prompt:
            raise BadInput(
                "both prompt and class_labels say what to draw", hint='leave one of them out, e.g. prompt=""'
            )
        labels = read_labels(message.class_labels, classes)
    elif message.prompt:
        names = [name.casefold() for name in classes.names]
        name = message.prompt.strip().casefold()  # which may have a comma in it
        labels = [names.index(name)] if name in names else read_labels(message.prompt, classes)
    count = message.n or (1 if labels is None else len(labels))
    if count > limits.images:
        raise BadInput(f"class_labels asks for {count} images; allowed are {limits.images}", hint="ask for fewer")
    return {"n": count} if labels is None else {"n": count, "labels": labels}
