"""Bodies of requests as messages: JSON, and forms with pictures."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from msgspec import inspect

from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.read import decode_json
from tstitch_engines.errors import nearest
from tstitch_trt.serve.http.errors import ApiError
from tstitch_trt.serve.http.limits import HttpLimits
from tstitch_trt.serve.http.messages import REFUSED, EditForm, EditRequest, GenerationRequest, ImagesRequest
from tstitch_trt.serve.http.options import Pictures
from tstitch_trt.serve.http.pictures import read_data_url

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["media_type", "read_edit", "read_generation"]

T = TypeVar("T", bound=ImagesRequest)

_QUICK: Final = 4096  # bytes that the event loop decodes itself
_MOST_FIELDS: Final = 1100  # of a form: class_labels[] once for each image
_FILES: Final = ("image", "image[]", "mask")
_HINTS: Final[Mapping[str, str]] = {
    "response_format": "pictures are in the answer: leave it out",
    "output_format": "ask for png, jpeg or webp",
    "background": "pictures are opaque: leave it out",
    "quality": "say steps, fraction or schedule",
    "moderation": "leave it out: nothing is moderated here",
    "image_url": "send data:image/png;base64,... with the picture in it; addresses are not fetched",
    "size": 'e.g. "512x512" or "auto"',
}
_PLACE: Final = re.compile(r"parameter '([a-z_]+)")


def media_type(request: Request) -> str:
    """Of the body."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_generation(request: Request, limits: HttpLimits) -> GenerationRequest:
    """Raises ``ApiError``."""
    if media_type(request) != "application/json":
        raise _wrong_type(request, "application/json")
    return await _json(request, GenerationRequest, limits)


async def read_edit(request: Request, limits: HttpLimits) -> tuple[ImagesRequest, Pictures]:
    """Raises ``ApiError``."""
    if media_type(request) == "application/json":
        message = await _json(request, EditRequest, limits)
        if len(message.images) != 1:
            raise _too_many(len(message.images))
        mask = None if message.mask is None else message.mask.image_url
        image = message.images[0].image_url
        return message, await asyncio.to_thread(_decoded, image, mask)
    if media_type(request) != "multipart/form-data":
        raise _wrong_type(request, "multipart/form-data or application/json")
    return await _form(request)


def _decoded(image: str, mask: str | None) -> Pictures:
    return Pictures(read_data_url(image, "image"), None if mask is None else read_data_url(mask, "mask"))


def _wrong_type(request: Request, allowed: str) -> ApiError:
    return ApiError(415, f"the body is {media_type(request)[:80] or 'of no type'}; allowed is {allowed}\nhint: set the "
                    "header Content-Type")  # fmt: skip


def _too_many(count: int) -> ApiError:
    return ApiError(400, f"{count} pictures were sent; one can be edited\nhint: send one image", param="image")


# --- JSON


async def _json(request: Request, kind: type[T], limits: HttpLimits) -> T:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    if len(body) <= _QUICK:
        return _decode(bytes(body), kind, limits)
    return await asyncio.to_thread(_decode, bytes(body), kind, limits)


def _decode(body: bytes, kind: type[T], limits: HttpLimits) -> T:
    if len(body) > limits.json_bytes:  # pictures: the decoder that makes nothing but what the message has
        return _decode_typed(body, kind)
    try:
        data = decode_json(body)
    except DecodeError as error:
        raise ApiError(400, _with_hint(f"the body is no JSON that is read: {error.message}", error.fix),
                       code="invalid_json") from None  # fmt: skip
    if not isinstance(data, dict):
        raise ApiError(400, "the body is no JSON object\nhint: send {...}", code="invalid_json")
    return _converted(data, kind)


def _decode_typed(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`(?: - at `.*`)?", str(error), re.DOTALL)
        if unknown is not None:
            raise _unknown(unknown[1], kind) from None
        problem, _, place = str(error).partition(" - at `$.")
        name = re.match(r"[a-z_]*", place)
        raise ApiError(400, f"{place.rstrip('`')[:80]}: {problem[:500]}\nhint: see /openapi.json",
                       param=name[0] if name and name[0] in kind.__struct_fields__ else None) from None  # fmt: skip
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise ApiError(400, "the body is no JSON\nhint: send {...}", code="invalid_json") from None


def _converted(data: dict[str, Any], kind: type[T]) -> T:
    for name, instead in REFUSED.items():
        if data.pop(name, None) is not None and name not in kind.__struct_fields__:
            raise ApiError(400, f"{name} is not supported\nhint: {instead}", param=name, code="unsupported_parameter")
    unknown = next((name for name in data if name not in kind.__struct_fields__), None)
    if unknown is not None:
        raise _unknown(unknown, kind)
    try:
        return convert(data, kind, word="parameter")
    except DecodeError as error:
        found = _PLACE.search(error.message)
        about = found[1] if found else None
        fix = error.fix or next((hint for word, hint in _HINTS.items() if f"{word}'" in error.message), "")
        raise ApiError(400, _with_hint(error.message, fix), param=about) from None


def _unknown(name: str, kind: type[ImagesRequest]) -> ApiError:
    close = nearest(name[:100], kind.__struct_fields__)
    fix = f"did you mean {close!r}?" if close else f"known are {', '.join(kind.__struct_fields__)}"
    return ApiError(400, f"unknown parameter {name[:80]!r}\nhint: {fix}", param=name[:80], code="unknown_parameter")


def _with_hint(message: str, fix: str) -> str:
    return f"{message}\nhint: {fix or 'see /openapi.json'}"


# --- forms


async def _form(request: Request) -> tuple[EditForm, Pictures]:
    from starlette.datastructures import UploadFile

    async with request.form(max_files=17, max_fields=_MOST_FIELDS, max_part_size=64 << 10) as form:
        fields: dict[str, Any] = {}
        pictures: dict[str, list[UploadFile]] = {"image": [], "mask": []}
        for name, value in form.multi_items():
            bare = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if name not in _FILES:
                    raise ApiError(400, f"unexpected file {name[:80]!r}\nhint: files are image and mask",
                                   param=name[:80], code="unknown_parameter")  # fmt: skip
                pictures[bare].append(value)
            elif name in _FILES:
                raise ApiError(400, f"{bare} is a text\nhint: send it as a file, with a filename", param=bare)
            elif name.endswith("[]") and isinstance(fields.setdefault(bare, []), list):
                fields[bare].append(value)
            elif bare in fields:
                raise ApiError(400, f"{bare[:80]!r} is given twice\nhint: give it once", param=bare[:80])
            else:
                fields[name] = _scalar(name, value)
        if len(pictures["image"]) > 1:
            raise _too_many(len(pictures["image"]))
        if not pictures["image"] or len(pictures["mask"]) > 1:
            raise ApiError(400, "needed is one image and at most one mask\nhint: -F image=@picture.png",
                           param="mask" if pictures["image"] else "image")  # fmt: skip
        message = _converted(fields, EditForm)
        image = await pictures["image"][0].read()
        mask = await pictures["mask"][0].read() if pictures["mask"] else None
    return message, Pictures(image, mask)


@cache
def _texts() -> frozenset[str]:
    """The fields that take a text: others are numbers or true and false, written as in JSON."""
    found = set()
    for each in inspect.type_info(EditForm).fields:  # type: ignore[attr-defined]  # of a struct
        kinds = each.type.types if isinstance(each.type, inspect.UnionType) else (each.type,)
        plain = [kind.type if isinstance(kind, inspect.Metadata) else kind for kind in kinds]
        if any(isinstance(kind, inspect.StrType | inspect.LiteralType) for kind in plain):
            found.add(each.name)
    return frozenset(found)


def _scalar(name: str, text: str) -> object:
    if name in _texts() or len(text) > 100:
        return text
    try:
        value = decode_json(text)
    except DecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text
