"""Logs of a server on stderr: one line of text or of JSON for each event.

A request has one line, when it is answered. Prompts are in it only where the operator asked for them. What a client
wrote is escaped in both forms.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, TextIO

import msgspec

from tstitch_engines.errors import TStitchError

__all__ = ["FORMATS", "LogFormat", "RequestLine", "log_request", "logging_to"]

LogFormat = Literal["text", "json"]
FORMATS: Final[tuple[LogFormat, ...]] = ("text", "json")

_LOGGERS: Final = ("tstitch_trt", "tstitch_engines", "tstitch_export", "uvicorn.error", "opentelemetry", "py.warnings")
_requests = logging.getLogger("tstitch_trt.serve.requests")


class RequestLine(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What is told of one request over HTTP. Times in seconds; ``queue`` to ``decode`` of its last image.

    ``outcome``: what became of its drawing: done, failed or cancelled. ``hung_up``: its client left before the answer
    was whole. ``error``: the kind of error, without what it says, which may have a client's words in it.
    """

    request_id: str
    method: str
    route: str
    status: int
    seconds: float
    client: str = ""
    model: str = ""
    images: int = 0
    steps: int = 0
    schedule: str = ""
    solver: str = ""
    priority: int = 0
    adapted: str = ""
    queue: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    outcome: str = ""
    error: str = ""
    hung_up: bool = False
    prompt: str = ""


def log_request(line: RequestLine) -> None:
    """At level INFO; a request that drew nothing and succeeded (a look at health or metrics) at DEBUG."""
    quiet = not line.model and line.status < 400 and not line.error
    fields = {name: round(value, 6) if isinstance(value, float) else value
              for name, value in msgspec.to_builtins(line).items()}  # fmt: skip
    _requests.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


@contextmanager
def logging_to(form: LogFormat, stream: TextIO | None = None, *, level: int = logging.INFO) -> Iterator[None]:
    """What our packages, uvicorn and OpenTelemetry log from ``level`` up, and Python's warnings, are written to
    ``stream`` (stderr) while the block runs."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, old, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(old)
            logger.propagate = propagate


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    return getattr(record, "fields", {})


def _error(record: logging.LogRecord) -> str:
    if record.exc_info is None or record.exc_info[1] is None:
        return ""
    error = record.exc_info[1]
    return str(error) if isinstance(error, TStitchError) else "".join(traceback.format_exception(error)).rstrip()


def _time(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name,
                                   "message": record.getMessage(), **_fields(record)}  # fmt: skip
        if error := _error(record):
            line["exception"] = error
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname.lower(), _escaped(record.getMessage())]
        words += [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        error = _error(record)
        return " ".join(words) + "".join(f"\n    {_escaped(line)}" for line in error.splitlines())


def _word(value: object) -> str:
    """A value without spaces or quotes as it is, every other as a JSON string."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & set(" \"'=\\")
    return text if plain and text else json.dumps(text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else json.dumps(text, ensure_ascii=False)[1:-1]
