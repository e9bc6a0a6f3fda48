"""docs/reference/errors.md: the tree of errors, their exit codes and the answers of the server."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Final

import tstitch_trt
from support.compatibility.markdown import code, table
from support.pages.words import as_markdown
from tstitch_engines import errors
from tstitch_engines.errors import Overloaded, TStitchError
from tstitch_trt.serve.http.errors import _CODES, to_api_error
from tstitch_trt.serve.http.openapi import _ERRORS

__all__ = ["classes", "statuses", "tree"]

_HELP: Final = "../troubleshooting.md"
_TO_DO: Final[Mapping[str, str]] = {
    "BadInput": "change the value that the message names",
    "UnknownName": f"take the name in the hint, or a listed one: "
    f"[unknown names]({_HELP}#unknown-option-keyword-or-recipe-key)",
    "BadSchedule": "make the shares add up, or name a member of the bundle: [schedules](schedules.md)",
    "BadCheckpoint": f"[a checkpoint is refused]({_HELP}#a-checkpoint-is-refused)",
    "BadBundle": f"[the bundle is damaged]({_HELP}#the-bundle-is-damaged), or "
    f"[of another version]({_HELP}#the-bundle-is-of-another-version)",
    "BadEngine": f"`--rebuild`: [engine refused]({_HELP}#engine-refused)",
    "Unsafe": "don't use the file; get it as safetensors from a source that you trust: [trust](../how-to/trust.md)",
    "Untrusted": f"sign the bundle, build it here, or `--trust`: "
    f"[an engine is not trusted]({_HELP}#an-engine-is-not-trusted)",
    "PairMismatch": f"[a pair is refused]({_HELP}#a-pair-is-refused)",
    "OutOfProfile": f"ask for a size within the range, or build with a wider one: "
    f"[a size is refused]({_HELP}#a-size-is-refused)",
    "NotCalibrated": "run `tstitch-trt calibrate BUNDLE` on this machine: [latency budgets](../how-to/budget.md)",
    "Unavailable": f"install the extra that the hint names, or choose another device or backend: "
    f"[a library is missing]({_HELP}#a-library-is-missing)",
    "FailedWork": "see its kinds; with `--traceback` the command prints where it happened",
    "BuildFailed": f"[the export fails]({_HELP}#the-onnx-export-fails-or-differs), or "
    f"[the disk is full]({_HELP}#the-disk-is-full-or-the-build-was-interrupted)",
    "OutOfTime": "raise `--time-limit`, or give the machine less other work",
    "OutOfMemory": f"[out of memory]({_HELP}#out-of-memory)",
    "NotFinite": f"[pictures are black, or NaN is reported]({_HELP}#pictures-are-black-or-nan-is-reported)",
    "NotFiniteInput": "look for NaN or infinity in the array that was given",
    "Cancelled": "nothing: the caller stopped it",
    "Busy": "wait longer (`timeout=`), or use `tstitch_trt.serve.Engine`, which takes many requests at once",
    "Overloaded": "try again after `retry_after` seconds, or ask for a larger budget",
    "Closed": "load the bundle again",
    "DeviceLost": "start a new process; the driver's log says what happened to the GPU",
}


def tree() -> str:
    lines = ["Exception", *_branch(TStitchError, 1)]
    return "```text\n" + "\n".join(lines) + "\n```"


def classes() -> str:
    found = [kind for kind in _all(TStitchError) if kind is not TStitchError]
    assert {kind.__name__ for kind in found} == _TO_DO.keys()
    rows = [
        [code(kind.__name__), _text(kind), str(kind.exit_code), _status(kind), _TO_DO[kind.__name__]] for kind in found
    ]
    return table(("error", "meaning", "exit code", "HTTP", "what to do"), rows)


def statuses() -> str:
    rows = [
        [str(status), code(_CODES.get(status, "")) if status in _CODES else "", text]
        for status, text in _ERRORS.items()
    ]
    return table(("status", "`code`", "meaning"), rows)


def _text(kind: type[TStitchError]) -> str:
    said = as_markdown(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    where = "" if kind.__name__ in tstitch_trt.__all__ else " In `tstitch_engines.errors`."
    return re.sub(r" Exit code \d\.", "", said) + where


def _status(kind: type[TStitchError]) -> str:
    error = kind("x", hint="y")
    if isinstance(error, Overloaded):
        error.retry_after = 1.0
    logging.disable()
    try:
        return str(to_api_error(error, "").status)
    finally:
        logging.disable(logging.NOTSET)


def _branch(kind: type[TStitchError], depth: int) -> Iterator[str]:
    yield "    " * depth + kind.__name__ + (f" (also {', '.join(_others(kind))})" if _others(kind) else "")
    for child in _children(kind):
        yield from _branch(child, depth + 1)


def _children(kind: type[TStitchError]) -> list[type[TStitchError]]:
    """Those whose first base it is, as the file has them."""
    ours = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, TStitchError)]
    return [each for each in ours if each.__bases__[0] is kind]


def _others(kind: type[TStitchError]) -> list[str]:
    return [base.__name__ for base in kind.__bases__[1:]]


def _all(kind: type[TStitchError]) -> Iterator[type[TStitchError]]:
    yield kind
    for child in _children(kind):
        yield from _all(child)
