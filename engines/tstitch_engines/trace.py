"""Spans of work, for Chrome's trace viewer and Perfetto (``Trace``) and for Nsight Systems (NVTX).

    with Trace() as trace:
        runtime.sample(labels=[3, 5])
    Path("trace.json").write_bytes(trace.to_json())

Code marks its work with ``span`` and ``traced``. While nobody records, a ``span`` costs a third of a microsecond and a
``traced`` function nothing: it is the function itself. A trace is a JSON object of complete ("X") and metadata ("M")
events, as Google's "Trace Event Format" describes them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter_ns
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar

from tstitch_engines.errors import BadInput, Busy
from tstitch_engines.needs import require

__all__ = ["MOST_SPANS", "Arg", "Trace", "current_trace", "recording", "span", "traced", "use_nvtx"]

P = ParamSpec("P")
T = TypeVar("T")

Arg = str | int | float | bool
Track = threading.Thread | str
MOST_SPANS: Final = 1_000_000  # about 150 MB of JSON, and 1 GB of memory while it is made
_VARIABLE: Final = "TSTITCH_TRT_NVTX"


class _Recording:
    """Who gets the spans of this process."""

    trace: Trace | None = None
    nvtx: Any = None  # a domain of the library nvtx


_RECORDING: Final = _Recording()


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING: Final = _Nothing()


class _Span:
    __slots__ = ("_range", "_trace", "args", "name", "start", "thread")

    def __init__(self, name: str, args: dict[str, Arg]) -> None:
        self.name = name
        self.args = args

    def __enter__(self) -> None:
        self._trace, domain = _RECORDING.trace, _RECORDING.nvtx
        # Not push and pop, which belong to a thread: a generator may be ended by another one than began its span.
        self._range = None if domain is None else (domain, domain.start_range(domain.get_event_attributes(_text(self))))
        self.thread = threading.current_thread()  # not its identifier, which a later thread may get
        self.start = perf_counter_ns()
        if self._trace is not None:
            self._trace.opened(self)

    def __exit__(self, *_: object) -> None:
        end = perf_counter_ns()
        if self._trace is not None:
            self._trace.closed(self, end)
        if self._range is not None:
            domain, began = self._range
            domain.end_range(began)


def _text(span: _Span) -> str:
    """``step 3 member=large``: what Nsight shows."""
    return " ".join([span.name, *(f"{name}={value}" for name, value in span.args.items())])


def recording() -> bool:
    """Whether anybody gets the spans."""
    return _RECORDING.trace is not None or _RECORDING.nvtx is not None


def span(name: str, **args: Arg) -> AbstractContextManager[None]:
    """A ``with`` block that is one span, of the thread that enters it. ``args`` are shown with it."""
    return _Span(name, args) if recording() else _NOTHING


def traced(name: str, function: Callable[P, T], **args: Arg) -> Callable[P, T]:
    """``function``, each of whose calls is a span; the function itself while nobody records."""
    if not recording():
        return function

    def call(*positional: P.args, **keywords: P.kwargs) -> T:
        with _Span(name, args):
            return function(*positional, **keywords)

    return call


def current_trace() -> Trace | None:
    """The trace that is being recorded in this process."""
    return _RECORDING.trace


def use_nvtx() -> None:
    """Sends spans to NVTX if ``$TSTITCH_TRT_NVTX`` is 1. Not run under Nsight on a GPU.

    Raises ``Unavailable`` without the library nvtx, and ``BadInput`` for a value other than 0 and 1.
    """
    value = os.environ.get(_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise BadInput(f"${_VARIABLE} is {value!r}; allowed are 0 and 1", hint=f"{_VARIABLE}=1, or unset it")
    if value == "1" and _RECORDING.nvtx is None:
        _RECORDING.nvtx = require("nvtx", f"{_VARIABLE}=1", extra="profile").get_domain("tstitch-trt")


class Trace:
    """Records the spans of all threads of this process while its ``with`` block runs: one trace at a time.

    Of more than ``MOST_SPANS`` spans the later ones are counted in ``dropped`` and not kept.
    """

    def __init__(self) -> None:
        self._start = perf_counter_ns()
        self._spans: list[tuple[Track, str, int, int, dict[str, Arg]]] = []  # track, name, start, end in ns
        self._open: dict[_Span, None] = {}
        self.dropped = 0

    def __enter__(self) -> Self:
        if _RECORDING.trace is not None:
            raise Busy("this process records a trace already", hint="end that one first")
        _RECORDING.trace = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _RECORDING.trace = None

    def opened(self, span: _Span) -> None:
        self._open[span] = None

    def closed(self, span: _Span, end: int) -> None:
        self._open.pop(span, None)
        self.add(span.thread, span.name, span.start, end, span.args)

    def add(self, track: Track, name: str, start: int, end: int, args: dict[str, Arg]) -> None:
        """A span on the track of a thread or on another one, by name: ``perf_counter_ns`` times."""
        if len(self._spans) >= MOST_SPANS:
            self.dropped += 1
        else:
            self._spans.append((track, name, start, end, args))

    def to_json(self) -> bytes:
        """The file's content. Spans that have not ended yet end now and say so: ``"unfinished": true``."""
        import msgspec

        now, process = perf_counter_ns(), os.getpid()
        unfinished = [(s.thread, s.name, s.start, now, {**s.args, "unfinished": True}) for s in self._open.copy()]
        every = sorted([*self._spans, *unfinished], key=lambda each: (each[2], -each[3]))
        # the threads first
        tracks = sorted(dict.fromkeys(track for track, *_ in every), key=lambda track: isinstance(track, str))
        places = {track: place for place, track in enumerate(tracks, start=1)}
        events: list[dict[str, object]] = [_metadata("process_name", process, 0, name="tstitch-trt")]
        for track, place in places.items():
            name = track if isinstance(track, str) else track.name
            events.append(_metadata("thread_name", process, place, name=name))
            events.append(_metadata("thread_sort_index", process, place, sort_index=place))
        for track, name, start, end, args in every:
            events.append(
                {
                    "name": name, "cat": "device" if isinstance(track, str) else "host", "ph": "X", "pid": process,
                    "tid": places[track], "ts": (start - self._start) / 1e3, "dur": (end - start) / 1e3, "args": args,
                }
            )  # fmt: skip
        return msgspec.json.encode(
            {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"dropped": self.dropped}}
        )


def _metadata(what: str, process: int, thread: int, **args: object) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": args}
