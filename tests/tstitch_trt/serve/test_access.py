"""What the log has of an answer. Of a whole server: ``test_serve_command.py``."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from pathlib import Path
from typing import Any, cast

import pytest

import tstitch_trt
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.serve.access import Access, Submissions
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.logs import logging_to
from tstitch_trt.serve.metrics import Metrics

pytest.importorskip("prometheus_client")
PROMPT = "somebody's secret " + "x" * 2000


def answer(app: Any, *, prompts: bool = False, path: str = "/v1/models/a") -> tuple[list[dict[str, Any]], str]:
    """The lines of the log, and the metrics."""
    metrics, stream = Metrics(), io.StringIO()
    access = Access(app, routes=["/v1/models/{model}", "/draw"], metrics=metrics, traces=None, prompts=prompts)
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "client": ("10.0.0.1", 5)}

    async def send(message: Any) -> None:
        pass

    with logging_to("json", stream), contextlib.suppress(ValueError):
        asyncio.run(access(scope, cast(Any, None), send))
    return [json.loads(line) for line in stream.getvalue().splitlines()], metrics.render("")[0].decode()


@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_are_logged_where_it_was_asked_for(fashion_bundle: Path, prompts: bool) -> None:
    with tstitch_trt.load(fashion_bundle, threads=1) as runtime:
        plan = runtime.plan(steps=5, fraction=0.4)
    handle = Handle("id", "m", plan, SampleOptions(prompt=PROMPT), 3, priority=2, deadline=None, adapted="steps 9 -> 5",
                    estimate=0.0, cancel=cast(Any, None))  # fmt: skip

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(Submissions().submitted, handle)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"r1")]})
        await send({"type": "http.response.body", "body": b"", "more_body": True})

    (line,), _ = answer(app, prompts=prompts, path="/draw")
    assert (line["request_id"], line["images"], line["steps"], line["priority"]) == ("r1", 3, 5, 2)
    assert (line["schedule"], line["adapted"]) == ("small[0:2] large[2:5]", "steps 9 -> 5")
    assert line["hung_up"], "its last part was never sent"
    assert line.get("prompt") == (PROMPT[:1000] if prompts else None)


def test_an_answer_that_nobody_reads_was_hung_up() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 499, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    (line,), _ = answer(app)
    assert (line["status"], line["hung_up"]) == (499, True)


def test_an_answer_that_breaks_has_a_traceback_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("in the middle")

    (error, line), page = answer(app)
    assert "in the middle" in error["exception"]
    assert (line["error"], line["hung_up"], line["route"]) == ("ValueError", True, "/v1/models/{model}")
    assert 'tstitch_http_responses_total{method="GET",route="/v1/models/{model}",status="200"} 1.0' in page
