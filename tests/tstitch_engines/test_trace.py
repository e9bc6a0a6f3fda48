"""Spans: what a trace holds, threads, what is unfinished, and NVTX."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tstitch_engines import trace as tracing
from tstitch_engines.errors import BadInput, Busy, Unavailable
from tstitch_engines.trace import Trace, span, traced, use_nvtx


def spans(trace: Trace) -> list[dict[str, Any]]:
    return [event for event in json.loads(trace.to_json())["traceEvents"] if event["ph"] == "X"]


def test_nothing_is_kept_and_no_function_is_wrapped_while_nobody_records() -> None:
    trace = Trace()
    with span("before"):
        pass
    assert traced("call", len) is len
    with trace:
        call = traced("call", len, of="list")
        assert call([1, 2]) == 2
    with span("after"):
        pass
    assert [(one["name"], one["args"]) for one in spans(trace)] == [("call", {"of": "list"})]


def test_each_thread_has_its_track_and_its_name() -> None:
    def work() -> None:
        with span("inside"):
            pass

    with Trace() as trace:
        work()
        other = threading.Thread(target=work, name="reader")
        other.start()
        other.join()
        trace.add("cuda:0", "step", 0, 1000, {})
    document = json.loads(trace.to_json())
    names = {e["tid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    tracks = [(names[one["tid"]], one["cat"]) for one in spans(trace)]
    assert sorted(tracks) == [("MainThread", "host"), ("cuda:0", "device"), ("reader", "host")]


def test_threads_one_after_another_have_tracks_of_their_own() -> None:
    """The system gives an identifier again as soon as its thread has ended."""
    with Trace() as trace:
        for name in ("first", "second"):
            one = threading.Thread(target=span(name).__enter__, name=name)
            one.start()
            one.join()
    document = json.loads(trace.to_json())
    names = {e["tid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert [(one["name"], names[one["tid"]]) for one in spans(trace)] == [("first", "first"), ("second", "second")]


def test_what_has_not_ended_is_there_and_an_error_ends_what_it_leaves() -> None:
    with Trace() as trace:
        with pytest.raises(ValueError, match="x"), span("failed"):
            raise ValueError("x")
        with span("outer"):
            found = {one["name"]: one["args"] for one in spans(trace)}
    assert found == {"failed": {}, "outer": {"unfinished": True}}
    assert [one["args"] for one in spans(trace)] == [{}, {}]


def test_one_trace_at_a_time_and_no_more_spans_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_SPANS", 2)
    with Trace() as trace:
        with pytest.raises(Busy), Trace():
            pass
        for _ in range(5):
            with span("one"):
                pass
    assert len(spans(trace)) == 2
    assert json.loads(trace.to_json())["otherData"] == {"dropped": 3}


def test_nvtx_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_RECORDING", tracing._Recording())
    monkeypatch.setenv("TSTITCH_TRT_NVTX", "0")
    use_nvtx()
    assert traced("call", len) is len
    monkeypatch.setenv("TSTITCH_TRT_NVTX", "yes")
    with pytest.raises(BadInput, match="allowed are 0 and 1"):
        use_nvtx()
    monkeypatch.setenv("TSTITCH_TRT_NVTX", "1")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "nvtx", None)
        with pytest.raises(Unavailable) as caught:
            use_nvtx()
        assert "tstitch-trt[profile]" in caught.value.hint
    use_nvtx()
    assert traced("call", len) is not len
    with span("works without a profiler", step=1):
        pass
