"""The messages of OpenAI's images API, with our own parameters beside theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

__all__ = [
    "FORMATS",
    "REFUSED",
    "CompletedEvent",
    "Drawn",
    "EditForm",
    "EditRequest",
    "ErrorBody",
    "ErrorDetail",
    "Format",
    "GenerationRequest",
    "Health",
    "Image",
    "ImageReference",
    "ImagesRequest",
    "ImagesResponse",
    "Model",
    "ModelDetail",
    "ModelList",
    "PartialImageEvent",
    "Reloaded",
    "Usage",
]

Format = Literal["png", "jpeg", "webp"]
FORMATS: Final[tuple[Format, ...]] = ("png", "jpeg", "webp")

Text = Annotated[str, Meta(max_length=20_000)]
Identifier = Annotated[str, Meta(max_length=512)]
Label = Annotated[int, Meta(ge=0, lt=2**31)] | Annotated[str, Meta(max_length=1000)]

REFUSED: Final[Mapping[str, str]] = {
    "style": "say it in the prompt",
    "complexity": "say steps, or fraction",
    "input_fidelity": "say strength: 0.3 changes little, 0.8 much",
    "frame_count": "pictures are png, jpeg or webp",
    "frame_duration_ms": "pictures are png, jpeg or webp",
    "svg": "pictures are png, jpeg or webp",
    "markup": "send a mask, whose transparent part is painted anew",
    "file_id": "no files are kept here: send the picture itself",
}
"""Parameters of OpenAI's that would change the picture and that nothing here can honour, and what to do instead."""


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class ImagesRequest(_Request, kw_only=True):
    """What both kinds of requests have."""

    prompt: Annotated[
        Text,
        Meta(description="What to draw. For a model of classes the name of one, or empty; required for all others."),
    ] | None = None  # fmt: skip
    model: Annotated[
        str, Meta(max_length=512, description="One of GET /v1/models; by default the first of them.")
    ] | None = None  # fmt: skip
    n: Annotated[int, Meta(ge=1, description="How many images; 1 by default.")] | None = None
    size: Annotated[
        str,
        Meta(
            pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
            description="WIDTHxHEIGHT in pixels, or auto: the model's own size, or that of the picture to edit.",
        ),
    ] | None = None  # fmt: skip
    response_format: Literal["b64_json"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[
        int, Meta(ge=0, le=100, description="Quality of jpeg and webp; 100 by default, which png only allows.")
    ] | None = None  # fmt: skip
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Identifier | None = None
    safety_identifier: Identifier | None = None
    stream: bool | None = None
    partial_images: Annotated[
        int, Meta(ge=0, le=3, description="Previews of each image, with stream.")
    ] | None = None  # fmt: skip
    steps: Annotated[
        int, Meta(ge=1, description="Steps of the solver; the model's own by default.")
    ] | None = None  # fmt: skip
    solver: Annotated[str, Meta(max_length=100, description="How the steps are made, e.g. ddim or dpm++2m.")] | None = (
        None
    )
    fraction: Annotated[
        float, Meta(ge=0, le=1, description="The share of the steps that the first, cheaper member takes.")
    ] | None = None  # fmt: skip
    rounding: Annotated[
        str, Meta(max_length=100, description="How fractions become steps: paper (the default), floor, lcm...")
    ] | None = None  # fmt: skip
    schedule: Annotated[
        str, Meta(max_length=10_000, description="Which member takes which steps, e.g. small:0.4,large.")
    ] | None = None  # fmt: skip
    guidance: Annotated[
        float, Meta(ge=0, description="Scale of classifier-free guidance; 1 is off.")
    ] | None = None  # fmt: skip
    seed: Annotated[
        int, Meta(ge=0, description="Of the first image, and one more for each further; below 2**64. By default a "
                  "random one, which the answer tells.")
    ] | None = None  # fmt: skip
    class_labels: (
        Annotated[int, Meta(ge=0, lt=2**31)]
        | Annotated[
            str, Meta(max_length=10_000, description="Of models of classes: a number, a name, or text as 0-4,sneaker.")
        ]
        | Annotated[list[Label], Meta(min_length=1, max_length=1000, description="The class of each image.")]
        | None
    ) = None
    negative_prompt: Annotated[Text, Meta(description="What not to draw, for guided steps.")] | None = None
    latency_budget_ms: Annotated[
        float,
        Meta(gt=0, description="Refused where the images can't be ready within this time; may lead to a cheaper "
             "schedule, which the answer tells."),
    ] | None = None  # fmt: skip
    priority: Annotated[
        int, Meta(description="Higher goes first; 0 by default.")
    ] | None = None  # fmt: skip


class GenerationRequest(ImagesRequest, kw_only=True):
    """Images to draw."""


class ImageReference(_Request, kw_only=True):
    """A picture in a JSON body."""

    image_url: Annotated[
        str,
        Meta(pattern=r"^data:image/(png|jpeg|webp);base64,", description="data:image/png;base64,...: the picture."),
    ]  # fmt: skip


Strength = Annotated[
    float,
    Meta(gt=0, le=1, description="The share of the steps that run: 0.3 changes little, 0.8 much. 0.8 by default, 1 "
         "with a mask."),
]  # fmt: skip


class EditRequest(ImagesRequest, kw_only=True):
    """A picture to draw anew."""

    images: Annotated[
        list[ImageReference],
        Meta(min_length=1, max_length=16, description="The picture. More than one can't be combined."),
    ]  # fmt: skip
    mask: Annotated[
        ImageReference, Meta(description="A picture of the same size; where it is transparent is painted anew.")
    ] | None = None  # fmt: skip
    strength: Strength | None = None


class EditForm(ImagesRequest, kw_only=True):
    """The fields of a form beside its files ``image`` and ``mask``."""

    strength: Strength | None = None


# --- answers


class _Answer(msgspec.Struct, kw_only=True):
    pass


class Image(_Answer, kw_only=True):
    """One image. ``b64_json``: the picture's file in base64."""

    b64_json: str


class Milliseconds(_Answer, kw_only=True):
    """Where the time went: waiting for a place, encoding texts and pictures, steps, decoding, all."""

    queued: float
    encode: float
    denoise: float
    decode: float
    total: float


class Drawn(_Answer, kw_only=True):
    """How the images were drawn. ``schedule``: the member of each step. ``seeds``: one per image, as they repeat it.

    ``adapted``: what was made cheaper under load, ``null`` where nothing was.
    """

    request_id: str
    model: str
    schedule: str
    steps: int
    solver: str
    seeds: list[Annotated[int, Meta(ge=0)]]
    labels: list[int]
    adapted: str | None
    milliseconds: Milliseconds


class ImagesResponse(_Answer, kw_only=True):
    """Images, in OpenAI's shape; ``tstitch`` is ours."""

    created: int
    data: list[Image]
    output_format: Format
    size: str
    tstitch: Drawn
    background: Literal["opaque"] = "opaque"
    safety_identifier: str | msgspec.UnsetType = msgspec.UNSET


class InputTokens(_Answer, kw_only=True):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(_Answer, kw_only=True):
    """Tokens are not counted: always 0."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = msgspec.field(default_factory=InputTokens)
    output_tokens: int = 0
    total_tokens: int = 0


class _Event(_Answer, kw_only=True):
    type: str
    b64_json: str
    created_at: int
    output_format: Format
    size: str
    image_index: int
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"


class PartialImageEvent(_Event, kw_only=True):
    """A preview of image ``image_index`` after step ``step``. ``type``: image_generation.partial_image or
    image_edit.partial_image."""

    partial_image_index: int
    step: int
    steps: int
    member: str


class CompletedEvent(_Event, kw_only=True):
    """Image ``image_index`` is done. ``type``: image_generation.completed or image_edit.completed."""

    tstitch: Drawn
    usage: Usage = msgspec.field(default_factory=Usage)
    safety_identifier: str | msgspec.UnsetType = msgspec.UNSET


class Model(_Answer, kw_only=True):
    """A model, in OpenAI's shape."""

    id: str
    created: int
    owned_by: str = "tstitch-trt"
    object: Literal["model"] = "model"


class ModelList(_Answer, kw_only=True):
    data: list[Model]
    object: Literal["list"] = "list"


class ModelDetail(Model, kw_only=True):
    """``kind``: class or text. ``sizes``: that all members draw. ``classes``: their names, where they have some."""

    kind: str
    members: list[str]
    sizes: str
    steps: int
    solver: str
    schedule: str
    guidance: float
    edits: bool
    class_count: int
    classes: list[str]


class Health(_Answer, kw_only=True):
    status: str


class Reloaded(_Answer, kw_only=True):
    """The models that were replaced."""

    models: list[str]


class ErrorDetail(_Answer, kw_only=True):
    """``message``: what is wrong and, on a line of its own, how to mend it. ``param``: the parameter it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer, kw_only=True):
    """An error, in OpenAI's shape."""

    error: ErrorDetail
