"""Errors in OpenAI's shape. What reaches a client names no path, no traceback and nobody else's data."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from tstitch_engines.errors import (
    BadBundle,
    BadCheckpoint,
    BadEngine,
    BadInput,
    Busy,
    Cancelled,
    Closed,
    DeviceLost,
    NotFinite,
    OutOfMemory,
    OutOfTime,
    Overloaded,
    PairMismatch,
    TStitchError,
)
from tstitch_trt.serve.http.messages import ErrorBody, ErrorDetail, ImagesRequest

__all__ = ["ApiError", "ClientGone", "error_answer", "to_api_error"]

_log = logging.getLogger("tstitch_trt.serve")

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"
_CODES: Final = {400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found",
                 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large",
                 415: "unsupported_media_type", 429: "rate_limit_exceeded", 500: "internal_error",
                 503: "unavailable", 504: "timeout"}  # fmt: skip
_PARAMETERS: Final = {name: name for name in ImagesRequest.__struct_fields__} | {
    "height": "size", "width": "size", "label": "class_labels", "labels": "class_labels", "strength": "strength",
    "image": "image", "mask": "mask", "seeds": "seed",
}  # fmt: skip
_FIRST: Final = re.compile(r"(?:the |unknown )?([a-z_]+)")
_PATH: Final = re.compile(r"(?<![\w.:/])(?:/[\w.@+~-]+){2,}/?")


class ClientGone(Exception):
    """The client has closed its connection."""


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. ``param``: the parameter it is about. ``wait``: seconds until it may be tried again.

    ``message``: for the client, so without anything that is not its own.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    wait: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def error_answer(error: ApiError) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    kind = _SERVER if error.status >= 500 else "rate_limit_error" if error.status == 429 else _INVALID
    detail = ErrorDetail(
        message=error.message, type=kind, param=error.param, code=error.code or _CODES.get(error.status)
    )
    headers = {"content-type": "application/json", **error.headers}
    if error.wait is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.wait)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.wait * 1000)))
    return error.status, headers, msgspec.json.encode(ErrorBody(error=detail))


def to_api_error(error: Exception, request_id: str) -> ApiError:
    """What a client is told of ``error``. What it is not told is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded) and error.retry_after is None:  # not even without load
        return ApiError(400, _text(error), param="latency_budget_ms")
    if isinstance(error, Overloaded):
        return ApiError(429, _text(error), wait=error.retry_after)
    if isinstance(error, Busy):
        return ApiError(429, _text(error), wait=1.0)
    if isinstance(error, Closed | Cancelled):
        return ApiError(503, "the server is ending\nhint: try again in some seconds", wait=5.0, code="closing")
    if isinstance(error, OutOfTime):
        return ApiError(504, f"{_text(error)}")
    if isinstance(error, NotFinite) and not isinstance(error, BadInput):
        _log.warning("%s", error.message, extra={"fields": {"request_id": request_id}})
        return ApiError(
            500, f"an image became NaN or infinite (request {request_id})\nhint: use usual values of guidance and "
            "steps, or another seed", code="not_finite", headers={"x-should-retry": "false"},
        )  # fmt: skip
    ours = isinstance(error, BadBundle | BadCheckpoint | BadEngine | PairMismatch)  # nothing the client could mend
    if isinstance(error, BadInput) and not ours:
        found = _FIRST.match(error.message)
        return ApiError(400, _text(error), param=_PARAMETERS.get(found[1]) if found else None)
    _log.error("request failed", exc_info=error, extra={"fields": {"request_id": request_id}})
    if isinstance(error, DeviceLost | OutOfMemory):
        return ApiError(503, f"the device failed (request {request_id})\nhint: try again in some seconds", wait=5.0)
    return ApiError(500, f"an error of the server, which its log describes (request {request_id})")


def _text(error: TStitchError) -> str:
    """Message and hint, without paths of this machine: a hint may name the bundle's."""
    return _PATH.sub("PATH", str(error))
