"""The child's side: it answers calls until its parent is gone, or has asked for nothing for some minutes.

python -m tstitch_engines.child.serve PARENT
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, get_type_hints

import msgspec

from tstitch_engines.child.protocol import HEADER, LARGEST, LOGGERS, Answer, Call, Channel, Done, Failure, Forward
from tstitch_engines.errors import TStitchError, first_line

__all__ = ["main"]

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_KILL_ME_FIRST: Final = 500  # of 1000: the kernel should end the child, not whoever waits for it
_IDLE_MS: Final = 300_000


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        os._exit(0)  # it died before the kernel knew that we go with it
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_KILL_ME_FIRST))
    calls = os.fdopen(os.dup(0), "rb", buffering=0)
    channel = Channel(os.fdopen(os.dup(1), "wb"))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # whatever libraries print
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(Forward(channel))
        logger.propagate = False
    while (call := _next(calls)) is not None:
        channel.send(_answer(call, channel))
    sys.stderr.flush()
    os._exit(0)  # without unloading anything: a library that crashes in that must not spoil finished work


def _next(calls: BinaryIO) -> Call | None:
    waiting = select.poll()
    waiting.register(calls, select.POLLIN)
    if not waiting.poll(_IDLE_MS):
        return None
    header = _read(calls, HEADER)
    size = int.from_bytes(header, "little")
    if len(header) < HEADER or size > LARGEST:
        return None
    content = _read(calls, size)
    return msgspec.msgpack.decode(content, type=Call) if len(content) == size else None


def _read(stream: BinaryIO, count: int) -> bytes:
    parts: list[bytes] = []
    while count and (part := stream.read(min(count, 1 << 24))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _answer(call: Call, channel: Channel) -> Answer:
    os.environ.clear()
    os.environ.update(call.environment)
    tempfile.tempdir = None  # TMPDIR may be another one now
    with suppress(OSError):
        os.chdir(call.folder)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(call.level)
    try:
        module, _, name = call.target.partition(":")
        function: Any = getattr(import_module(module), name)
        request = msgspec.msgpack.decode(call.request, type=get_type_hints(function)["request"])
        value = msgspec.msgpack.encode(function(request, channel))
    except TStitchError as error:
        return Failure(type(error).__name__, error.message, error.hint)
    except MemoryError as error:
        return Failure("OutOfMemory", f"memory ran out: {first_line(error)}", "")
    except OSError as error:
        return Failure("OSError", error.strerror or str(error), str(error.filename or ""), error.errno or 0)
    except Exception as error:
        traceback.print_exc()
        return Failure("", f"{type(error).__name__}: {first_line(error).strip()}", "")
    return Done(value, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


if __name__ == "__main__":
    main()
