"""Runs the worker: passes on its progress, turns whatever becomes of it into an error, and leaves nothing behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

import tstitch_engines.errors
from tstitch_engines.backends.tensorrt.estimate import Estimate, free_memory
from tstitch_engines.backends.tensorrt.messages import Done, Failure, Line, Phase, Request, Said
from tstitch_engines.errors import TStitchError
from tstitch_engines.progress import Progress
from tstitch_engines.worker_process import worker

__all__ = ["run_worker"]

_log = logging.getLogger(__name__)

_MODULE: Final = "tstitch_engines.backends.tensorrt.worker"


def run_worker(request: Request, *, expected: Estimate, progress: Progress) -> Done:
    """Compiles ``request`` in a process of its own.

    On an error, Ctrl-C or any other exception the worker is killed at once. Raises what the worker raised, or
    ``BuildFailed`` when it died.
    """
    decoder = msgspec.json.Decoder(Line)
    with worker(_MODULE, msgspec.json.encode(request)) as opened:
        for text in opened.answers:
            try:
                line: Line = decoder.decode(text)
            except msgspec.DecodeError:
                break  # cut short by the death of the writer
            if isinstance(line, Phase):
                progress(line.name, line.share)
            elif isinstance(line, Said):
                _log.log(line.level, "%s", line.text)
            elif isinstance(line, Failure):
                kind: type[TStitchError] = getattr(tstitch_engines.errors, line.kind)
                raise kind(line.message, hint=line.hint)
            else:
                return line
        free = free_memory()
        have = "" if free is None else f", free now are {free / 2**30:.1f} GiB"
        raise opened.failure(
            f"the process compiling {Path(request.model).name}",
            needs=f"; it needs {expected}{have}",
            if_killed="free memory, or build on a machine with more and copy the bundle",
            if_crashed="the library crashed: try another precision or version of it, and report this message",
        )
