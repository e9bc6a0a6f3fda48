"""The parent's side: starts children, gives them work, watches their limits and turns whatever becomes of them into
an error.

A child that is kept answers the next call too, so that its start (libraries take seconds to load) is paid once. It goes
with this process, whatever ends that.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from time import monotonic, sleep
from typing import IO, Any, Final, TypeVar, get_type_hints

import msgspec

import tstitch_engines.errors
from tstitch_engines.child.limits import DEFAULT, Limits, show_size, show_time
from tstitch_engines.child.memory import data_bytes, free_memory, resident_bytes
from tstitch_engines.child.protocol import (
    HEADER,
    LARGEST,
    LARGEST_ANSWER,
    LOGGERS,
    Answer,
    Call,
    Channel,
    Done,
    Failure,
    Lap,
    Phase,
    Said,
    frame,
)
from tstitch_engines.errors import FailedWork, OutOfMemory, OutOfTime, TStitchError
from tstitch_engines.progress import Progress, silent

R = TypeVar("R")
T = TypeVar("T")

__all__ = ["Job", "end_children", "run_in_child"]

_log = logging.getLogger(__name__)

_MODULE: Final = "tstitch_engines.child.serve"
_TAIL: Final = 2000  # characters of stderr that an error quotes at most
_CHATTER: Final = 16 << 20  # bytes of stderr that are kept
_POLL_MS: Final = 50
_LINGER: Final = 2.0  # seconds that a child may take to end when it has closed its pipe
_LARGEST_IDLE: Final = 2 << 30  # bytes that a child may hold while it waits for work
_SLACK: Final = 2 << 30  # of RLIMIT_DATA: stacks of threads and arenas, which are mostly never touched
_NO_MEMORY: Final = ("bad_alloc", "bad allocation", "failed to allocate memory", "can't allocate memory")
_ENVIRONMENT_FREE: Final = ("PYTEST_CURRENT_TEST",)


@dataclass(frozen=True, kw_only=True)
class Job:
    """How work in a child is spoken of, and how it is limited.

    ``what`` names it in messages. ``error``: the class for a child that dies or fails without an error of ours.
    ``needs`` says how much memory it needs. The hint is ``if_killed`` where it was killed, as the kernel does without
    memory, else ``if_crashed``. ``seconds``: the limit of time unless ``limits`` has one. ``kept``: its child may
    answer later calls and may have answered others. ``host_only``: it uses no GPU, whose driver reserves more addresses
    than RLIMIT_DATA would allow. ``temporary``: where its temporary files go. ``environment``: variables besides those
    of this process, from its start on where it is not ``kept``.
    """

    what: str
    seconds: float
    limits: Limits = DEFAULT
    error: type[TStitchError] = FailedWork
    needs: str = ""
    if_killed: str = "free memory, or use a machine with more"
    if_crashed: str = "the library crashed: try another version of it, and report this message"
    kept: bool = True
    host_only: bool = True
    temporary: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def run_in_child(
    function: Callable[[R, Channel], T],
    request: R,
    job: Job,
    *,
    progress: Progress = silent,
    on_done: Callable[[int], object] | None = None,
) -> T:
    """``function(request, channel)`` in a child; ``on_done`` gets the largest memory that the child has had, in bytes.

    The function is one of a module, its argument is called ``request`` and is, like its result, something that msgspec
    writes and reads by its type. Raises what it raises where that is of our tree or an ``OSError``; ``OutOfTime`` and
    ``OutOfMemory`` at the limits, and ``job.error`` when the child dies. On any error that is not the function's own,
    Ctrl-C among them, the child is killed at once with all that it started.
    """
    call = frame(
        Call(
            target=f"{function.__module__}:{function.__qualname__}",
            request=msgspec.msgpack.encode(request),
            environment={
                **{name: value for name, value in os.environ.items() if name not in _ENVIRONMENT_FREE},
                **({} if job.temporary is None else {"TMPDIR": str(job.temporary.absolute())}),
                **job.environment,
            },
            folder=_folder(),
            level=min(logging.getLogger(name).getEffectiveLevel() for name in LOGGERS),
        )
    )
    if len(call) > LARGEST:
        raise OutOfMemory(
            f"{job.what} would be given {show_size(len(call))} at once; allowed is {show_size(LARGEST)}",
            hint="use fewer or smaller inputs",
        )
    kind: Any = get_type_hints(function)["return"]
    for attempt in (1, 2):
        child = _children.take(job) if attempt == 1 else _Child({})
        try:
            done = child.answer(call, job, progress)
        except _EndedIdle:
            child.end()
            continue
        except _Answered as answered:
            _children.give_back(child, job)
            raise answered.error from None
        except BaseException:
            child.end()
            raise
        value: T = msgspec.msgpack.decode(done.value, type=kind)
        _children.give_back(child, job)
        if on_done is not None:
            on_done(done.peak_bytes)
        return value
    raise AssertionError("a new child has waited for nothing")


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return "/"


class _Answered(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _EndedIdle(Exception):
    """The child had gone, for want of work, before it read the call."""


class _Child:
    """A process that answers one call at a time, for one thread at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - `_kill` closes it
        fcntl.fcntl(self._stderr, fcntl.F_SETFL, os.O_APPEND)  # so that it can be emptied while it is written
        self.process = _starter.start(self._stderr, environment)
        self._calls = 0
        self._finish = weakref.finalize(self, _kill, self.process, self._stderr)

    def end(self) -> None:
        """Kills it with all that it started. Once."""
        self._finish()

    def answer(self, call: bytes, job: Job, progress: Progress) -> Done:
        """Sends ``call`` and reads answers until the last. Raises ``_Answered`` with an error that the child sent."""
        process, watch = self.process, _Watch(self.process.pid, job)
        assert process.stdin is not None
        assert process.stdout is not None
        into, out = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(into, False)
        fresh, self._calls = self._calls == 0, self._calls + 1
        os.ftruncate(self._stderr.fileno(), 0)
        unsent, received, heard = memoryview(call), bytearray(), False
        poll = select.poll()
        poll.register(out, select.POLLIN)
        poll.register(into, select.POLLOUT)
        while True:
            ready = dict(poll.poll(_POLL_MS))
            if into in ready:
                try:
                    unsent = unsent[os.write(into, unsent[: 1 << 20]) :]
                except BlockingIOError:
                    pass
                except BrokenPipeError:
                    unsent = unsent[:0]
                if not unsent:
                    poll.unregister(into)
            if out in ready:
                part = os.read(out, 1 << 20)
                if not part:
                    code = _reap(process)
                    if code == 0 and not (fresh or heard):
                        raise _EndedIdle
                    raise self._death(code, job, watch)
                received += part
                while (message := _cut(received, job)) is not None:
                    heard = True
                    if isinstance(message, Phase):
                        progress(message.name, message.share)
                    elif isinstance(message, Said):
                        logging.getLogger(message.logger).log(message.level, "%s", message.text)
                    elif isinstance(message, Lap):
                        watch.restart()
                    elif isinstance(message, Failure):
                        raise _Answered(_error(message, job, watch))
                    else:
                        watch.end()
                        return message
            watch.check()
            if os.fstat(self._stderr.fileno()).st_size > _CHATTER:
                os.ftruncate(self._stderr.fileno(), 0)

    def _death(self, code: int | None, job: Job, watch: _Watch) -> TStitchError:
        """The error for a child that ended without an answer. ``code``: see ``_reap``."""
        if code == -signal.SIGKILL:
            free = free_memory()
            have = "" if free is None or not job.needs else f", free now are {show_size(free)}"
            problem = f"{job.what} was killed (SIGKILL), as the kernel does when memory runs out{job.needs}{have}"
            return job.error(problem, hint=job.if_killed)
        said = self._said()
        if any(words in said.lower() for words in _NO_MEMORY):
            return watch.out_of_memory(said)
        known = {one.value: one.name for one in signal.Signals}
        if code is None:
            ended = f"closed its pipe, went on for {_LINGER:g} s, and was ended"
        else:
            ended = "ended with " + (f"exit code {code}" if code >= 0 else f"signal {known.get(-code, str(-code))}")
        return job.error(f"{job.what} {ended}{f': {said}' if said else ''}", hint=job.if_crashed)

    def _said(self) -> str:
        """The end of what it wrote to stderr, on one line."""
        number = self._stderr.fileno()
        text = os.pread(number, _TAIL, max(os.fstat(number).st_size - _TAIL, 0)).decode(errors="replace")
        return " | ".join(line.strip() for line in text.splitlines()[-5:] if line.strip())


class _Watch:
    """The limits of one call."""

    def __init__(self, process: int, job: Job) -> None:
        self._process = process
        self._job = job
        limits = job.limits
        self._seconds = job.seconds if limits.time is None else limits.time
        held, free = resident_bytes(process), free_memory()
        self._memory = limits.memory if limits.memory is not None else None if free is None else held + free
        self.restart()
        if job.host_only and self._memory is not None and (data := data_bytes(process)) is not None:
            self._limit_data(data + max(self._memory - held, 0) + _SLACK)

    def restart(self) -> None:
        self._deadline = monotonic() + self._seconds

    def end(self) -> None:
        self._limit_data(resource.RLIM_INFINITY)

    def _limit_data(self, size: int) -> None:
        """What is above it is refused at once, before pages are touched; what is below, ``check`` looks at."""
        with suppress(OSError, ValueError, AttributeError):
            hard = resource.prlimit(self._process, resource.RLIMIT_DATA)[1]
            resource.prlimit(self._process, resource.RLIMIT_DATA, (size, hard))

    def check(self) -> None:
        """Raises ``OutOfTime`` or ``OutOfMemory`` for a child that is beyond its limits."""
        job = self._job
        if monotonic() > self._deadline:
            raise OutOfTime(
                f"{job.what} took longer than its limit of {show_time(self._seconds)} and was ended",
                hint=f"if it is known to be slow, allow more: --time-limit {_more(self._seconds)} (time_limit=); a "
                "stranger's file may be made to run for ever",
            )
        if self._memory is not None and (held := resident_bytes(self._process)) > self._memory:
            raise self.out_of_memory(f"it held {show_size(held)}")

    def out_of_memory(self, how: str) -> OutOfMemory:
        job, limit = self._job, self._memory
        given = job.limits.memory is not None
        allowed = "" if limit is None else f"; its limit is {show_size(limit)}"
        free = "" if given or limit is None else ", what was free when it began"
        more = "raise --memory-limit (memory_limit=)" if given else job.if_killed
        return OutOfMemory(
            f"{job.what} ran out of memory: {how}{allowed}{free}{job.needs}",
            hint=f"{more}; a stranger's file may be made to ask for any amount",
        )


def _more(seconds: float) -> str:
    return f"{max(2 * seconds / 60, 1):.0f}m"


def _cut(received: bytearray, job: Job) -> Answer | None:
    """The first whole message, which is taken out of ``received``."""
    if len(received) < HEADER:
        return None
    size = int.from_bytes(received[:HEADER], "little")
    if size > LARGEST_ANSWER:
        raise OutOfMemory(
            f"{job.what} answered with {show_size(size)}; allowed is {show_size(LARGEST_ANSWER)}",
            hint="use fewer or smaller inputs",
        )
    if len(received) < HEADER + size:
        return None
    message: Answer = msgspec.msgpack.decode(memoryview(received)[HEADER : HEADER + size], type=Answer)
    del received[: HEADER + size]
    return message


def _error(failure: Failure, job: Job, watch: _Watch) -> Exception:
    if failure.kind == "OSError" and failure.number != errno.ENOMEM:
        return OSError(failure.number, failure.message, failure.hint or None)
    known = getattr(tstitch_engines.errors, failure.kind, None) if failure.kind else None
    own = isinstance(known, type) and issubclass(known, TStitchError)
    if failure.kind in ("OSError", "OutOfMemory") and not failure.hint:
        return watch.out_of_memory(failure.message)
    if any(words in failure.message.lower() for words in _NO_MEMORY):
        return watch.out_of_memory(failure.message)
    if own:
        made: TStitchError = known(failure.message, hint=failure.hint)  # type: ignore[misc]
        return made
    return job.error(f"{job.what} failed: {failure.message}", hint=job.if_crashed)


# --- starting, keeping, ending


def _start(stderr: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """It finds our modules where this process does; ``-P`` keeps modules in the working directory out. It has a session
    of its own: Ctrl-C in the terminal reaches the caller only, and it can be killed with all that it started.
    """
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    return subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
        [sys.executable, "-P", "-m", _MODULE, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": path, **environment},
        bufsize=0,
        start_new_session=True,
    )


def _reap(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit code, or ``None`` if it went on without its pipe and had to be killed.

    What it started is killed too, before it is waited for: until then its number can't be another's.
    """
    ended, deadline = False, monotonic() + _LINGER
    try:
        while not ended and monotonic() < deadline:
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
            if not ended:
                sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:  # somebody else has waited for it
        ended = True
    code = process.wait()
    return code if ended else None


def _kill(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    if process.returncode is None:
        process.kill()
        _reap(process)
    for stream in (process.stdin, process.stdout, stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()


class _Children:
    """The children that wait for work: one at most, any thread's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []

    def take(self, job: Job) -> _Child:
        """A waiting child, or a new one where none waits or the one that does holds much of what the job is allowed."""
        with self._lock:
            child = self._idle.pop() if job.kept and self._idle else None
        if child is not None and child.process.poll() is None:
            allowed = job.limits.memory
            if allowed is None or resident_bytes(child.process.pid) <= allowed // 2:
                return child
        if child is not None:
            child.end()
        return _Child({} if job.kept else job.environment)

    def give_back(self, child: _Child, job: Job) -> None:
        small = resident_bytes(child.process.pid) <= _LARGEST_IDLE
        with self._lock:
            if job.kept and small and not self._idle:
                self._idle.append(child)
                return
        child.end()

    def end(self) -> None:
        with self._lock:
            waiting, self._idle = self._idle, []
        for child in waiting:
            child.end()


class _Starter:
    """Starts children in a thread that lives as long as the process: the kernel ends a child with its starter.

    A daemon, and not an executor's thread: Ctrl-C while an executor starts a thread leaves one that it does not know,
    and Python waits for that one for ever when it exits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: SimpleQueue[tuple[IO[bytes], Mapping[str, str], SimpleQueue[Any]]] = SimpleQueue()
        self._runs = False

    def start(self, stderr: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self._lock:
            if not self._runs:  # after Ctrl-C in here a second thread may serve the queue too, which does no harm
                threading.Thread(target=self._run, name="tstitch-children", daemon=True).start()
                self._runs = True
        answer: SimpleQueue[subprocess.Popen[bytes] | Exception] = SimpleQueue()
        self._asked.put((stderr, environment, answer))
        started = answer.get()
        if isinstance(started, Exception):
            raise started
        return started

    def _run(self) -> None:
        while True:
            stderr, environment, answer = self._asked.get()
            try:
                answer.put(_start(stderr, environment))
            except Exception as error:
                answer.put(error)
            del stderr, answer


_children = _Children()
_starter = _Starter()


def end_children() -> None:
    """Ends the child that waits for more work, which holds some memory. The next call starts another."""
    _children.end()


def _forget() -> None:
    """In a forked process: the children are the parent's."""
    global _children, _starter
    for child in _children._idle:
        child._finish.detach()
    _children = _Children()
    _starter = _Starter()


os.register_at_fork(after_in_child=_forget)
