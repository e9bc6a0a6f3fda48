"""Runs the worker: passes on its progress, turns whatever becomes of it into an error, and leaves nothing behind."""

from __future__ import annotations

import logging
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

import tstitch_engines.errors
from tstitch_engines.backends.tensorrt.estimate import Estimate, free_memory
from tstitch_engines.backends.tensorrt.messages import Done, Failure, Line, Phase, Request, Said
from tstitch_engines.errors import BuildFailed, TStitchError
from tstitch_engines.progress import Progress
from tstitch_engines.worker_process import how_it_ended, start_worker, tail

__all__ = ["run_worker"]

_log = logging.getLogger(__name__)

_MODULE: Final = "tstitch_engines.backends.tensorrt.worker"


def run_worker(request: Request, *, expected: Estimate, progress: Progress) -> Done:
    """Compiles ``request`` in a process of its own.

    On an error, Ctrl-C or any other exception the worker is killed at once and its output file removed. Raises what
    the worker raised, or ``BuildFailed`` when it died.
    """
    finished: Done | None = None
    with tempfile.TemporaryFile() as complaints:
        process = start_worker(_MODULE, complaints)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(msgspec.json.encode(request))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it died: how, is told below
            for line in _lines(process.stdout):
                if isinstance(line, Phase):
                    progress(line.name, line.share)
                elif isinstance(line, Said):
                    _log.log(line.level, "%s", line.text)
                elif isinstance(line, Failure):
                    raise _error(line)
                else:
                    finished = line
            process.wait()
            if finished is None:
                raise _died(process.returncode, request, expected, tail(complaints))
        except BaseException:
            process.kill()
            process.wait()
            Path(request.output).unlink(missing_ok=True)
            raise
        finally:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
    return finished


def _lines(stream: IO[bytes]) -> Iterator[Line]:
    decoder = msgspec.json.Decoder(Line)
    for line in stream:
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError:
            return  # cut short by the death of the writer


def _error(failure: Failure) -> TStitchError:
    kind: type[TStitchError] = getattr(tstitch_engines.errors, failure.kind)
    return kind(failure.message, hint=failure.hint)


def _died(code: int, request: Request, expected: Estimate, said: str) -> BuildFailed:
    model = Path(request.model).name
    if code == -signal.SIGKILL:
        free = free_memory()
        have = "" if free is None else f", free now are {free / 2**30:.1f} GiB"
        return BuildFailed(
            f"the process compiling {model} was killed (SIGKILL), as the kernel does when memory runs out; "
            f"it needs {expected}{have}",
            hint="free memory, or build on a machine with more and copy the bundle",
        )
    return BuildFailed(
        f"the process compiling {model} ended with {how_it_ended(code)}{f': {said}' if said else ''}",
        hint="the library crashed: try another precision or version of it, and report this message",
    )
