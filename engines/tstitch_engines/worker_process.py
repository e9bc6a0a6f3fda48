"""Processes of our own that do what may crash, leak or run out of memory: started, ended and asked what went wrong."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, Final, NamedTuple, NoReturn

from tstitch_engines.errors import BuildFailed

__all__ = ["Worker", "end_worker", "open_answers", "worker"]

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_TAIL: Final = 2000  # characters of stderr that an error quotes at most


class Worker(NamedTuple):
    """A process at work; ``answers`` is the pipe that it got as stdout."""

    process: subprocess.Popen[bytes]
    answers: IO[bytes]
    stderr: IO[bytes]

    def said(self) -> str:
        """The end of what it wrote to stderr, on one line. Waits for its end."""
        self.process.wait()
        end = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(end - _TAIL, 0))
        text = self.stderr.read().decode(errors="replace")
        return " | ".join(line.strip() for line in text.splitlines()[-5:] if line.strip())

    def failure(self, what: str, *, needs: str = "", if_killed: str, if_crashed: str) -> BuildFailed:
        """The error for a worker that ended without an answer. Waits for its end.

        ``what`` names it in the message, ``needs`` says how much memory it needs. The hint is ``if_killed`` when it was
        killed, as the kernel does without memory, else ``if_crashed``.
        """
        said, code = self.said(), self.process.returncode
        if code == -signal.SIGKILL:
            problem = f"{what} was killed (SIGKILL), as the kernel does when memory runs out{needs}"
            return BuildFailed(problem, hint=if_killed)
        known = {one.value: one.name for one in signal.Signals}
        ended = f"exit code {code}" if code >= 0 else f"signal {known.get(-code, str(-code))}"
        return BuildFailed(f"{what} ended with {ended}{f': {said}' if said else ''}", hint=if_crashed)


@contextmanager
def worker(module: str, request: bytes, env: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """``python -m module`` with ``request`` on stdin; it is killed at the end of the block, whatever ends that.

    It finds our modules where this process does; ``-P`` keeps modules in the working directory out. It has a session of
    its own: Ctrl-C in the terminal reaches the caller only.
    """
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdout as answers:
                with suppress(BrokenPipeError), process.stdin as stdin:  # else it died: how, `failure` says
                    stdin.write(request)
                yield Worker(process, answers, stderr)
        finally:
            process.kill()
            process.wait()


def open_answers() -> BinaryIO:
    """The worker's pipe for answers, which was its stdout; whatever libraries print goes to stderr from now on.

    Called first in the worker. The kernel then kills it when its parent dies.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def end_worker() -> NoReturn:
    """Ends the worker without unloading anything: a library that crashes in that must not spoil finished work."""
    sys.stderr.flush()
    os._exit(0)
