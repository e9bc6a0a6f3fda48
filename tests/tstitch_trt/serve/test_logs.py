"""Lines of the log: one for each event, whatever is in it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from tstitch_engines.errors import BadBundle
from tstitch_trt.serve.logs import LogFormat, RequestLine, log_request, logging_to

LINE = RequestLine(
    request_id="abc", method="POST", route="/v1/images/generations", status=200, seconds=1.23456789, model="fashion",
    images=2, steps=10, schedule="small[0:4] large[4:10]", outcome="done", hung_up=True,
)  # fmt: skip


def logged(form: LogFormat, *lines: RequestLine) -> list[str]:
    stream = io.StringIO()
    with logging_to(form, stream):
        for line in lines:
            log_request(line)
    return stream.getvalue().splitlines()


def test_a_request_as_json() -> None:
    (line,) = logged("json", LINE)
    found = json.loads(line)
    assert found["logger"] == "tstitch_trt.serve.requests"
    assert (found["level"], found["message"]) == ("info", "request")
    assert (found["seconds"], found["hung_up"], found["schedule"]) == (1.234568, True, "small[0:4] large[4:10]")
    assert "prompt" not in found, "what is not known is left out"


def test_a_request_as_text() -> None:
    (line,) = logged("text", LINE)
    assert "info request request_id=abc method=POST route=/v1/images/generations status=200 seconds=1.234568" in line
    assert 'schedule="small[0:4] large[4:10]"' in line
    assert "hung_up=true" in line


def test_looks_at_health_have_no_line_unless_they_fail() -> None:
    look = RequestLine(request_id="", method="GET", route="/healthz", status=200, seconds=0.001)
    refused = RequestLine(request_id="", method="POST", route="none", status=401, seconds=0.001)
    assert len(logged("json", look, refused)) == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_stays_one_whatever_a_client_wrote(form: LogFormat) -> None:
    hostile = 'a\nb\r\x1b[31m "quoted" \u2028 level=error \ud800'
    lines = logged(form, RequestLine(request_id=hostile, method=hostile, route="none", status=400, seconds=0,
                                     prompt=hostile))  # fmt: skip
    assert len(lines) == 1
    assert lines[0].isascii()
    assert lines[0].isprintable()
    if form == "json":
        assert json.loads(lines[0])["prompt"] == hostile


def test_errors_of_ours_are_said_without_a_traceback_and_others_with_it() -> None:
    stream = io.StringIO()
    log = logging.getLogger("tstitch_trt.serve")
    with logging_to("json", stream):
        for error in (BadBundle("no good", hint="another one"), ValueError("a bug")):
            try:
                raise error
            except Exception:
                log.exception("failed")
    ours, other = map(json.loads, stream.getvalue().splitlines())
    assert ours["exception"] == "no good\nhint: another one"
    assert "Traceback" in other["exception"]


def test_loggers_are_as_before() -> None:
    log = logging.getLogger("tstitch_trt")
    before = (log.level, log.propagate, list(log.handlers))
    logged("text", LINE)
    assert (log.level, log.propagate, list(log.handlers)) == before
