"""Work for child processes that goes wrong in every way."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from tstitch_engines.child import Array, Channel
from tstitch_engines.errors import BadInput

__all__ = ["Order", "carry_out"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """``word`` says what to do."""

    word: str
    number: int = 0
    array: Array | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    number: int = 0
    array: Array | None = None
    place: tuple[str, ...] = ()


def carry_out(request: Order, channel: Channel) -> Outcome:
    channel.progress("started", 0.0)
    held: list[Any] = []
    match request.word:
        case "where":
            return Outcome(pid=os.getpid(), place=(str(Path.cwd()), os.environ.get("WHO", ""), tempfile.gettempdir()))
        case "sleep":
            time.sleep(3600)
        case "spin":
            while True:
                pass
        case "laps":
            for _ in range(request.number):
                time.sleep(0.2)
                channel.lap()
        case "grow":
            while True:
                held.append(b"x" * (16 << 20))
                time.sleep(0.02)
        case "grow in its own child":
            subprocess.run([sys.executable, "-c", f"import time; a = b'x' * {request.number}; time.sleep(3600)"])
        case "one block":
            held.append(bytes(request.number))
        case "print":
            while True:
                os.write(1, b"x" * (1 << 20))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            ctypes.string_at(0)
        case "close everything":
            os.closerange(0, 100)
            time.sleep(3600)
        case "exit":
            os._exit(0)
        case "refuse":
            raise BadInput("this is refused", hint="ask for something else")
        case "fail":
            raise KeyError("nobody expects this")
        case "disk":
            raise OSError(28, "No space left on device", "/some/file")
        case "double":
            assert request.array is not None
            return Outcome(pid=os.getpid(), array=Array.of(request.array.numpy() * 2))
    return Outcome(pid=os.getpid(), number=request.number + 1)
