"""What is told of each answer over HTTP: one line in the log, one count, one span."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from tstitch_trt.serve.logs import RequestLine, log_request
from tstitch_trt.serve.observer import Observer

if TYPE_CHECKING:
    from tstitch_trt.serve.handle import Handle
    from tstitch_trt.serve.metrics import Metrics
    from tstitch_trt.serve.tracing import Traces

__all__ = ["Access", "Submissions"]

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LONGEST_PROMPT: Final = 1000  # characters in a line of the log
_CLIENT_GONE: Final = 499  # the status of an answer that nobody reads
_submitted: ContextVar[list[Handle] | None] = ContextVar("submitted", default=None)


class Submissions(Observer):
    """An observer of the engine that notes which request over HTTP submitted what."""

    def submitted(self, handle: Handle) -> None:
        noted = _submitted.get()
        if noted is not None:
            noted.append(handle)


class Access:
    """An ASGI application around the server's. ``routes``: the paths it has, with one name in braces at their end for
    those that vary; every other path is logged and counted as ``none``. ``prompts``: they are logged, cut to 1,000
    characters."""

    def __init__(
        self, app: App, *, routes: Iterable[str], metrics: Metrics, traces: Traces | None, prompts: bool
    ) -> None:
        self._app = app
        self._routes = {route.partition("{")[0]: route for route in routes}
        self._metrics = metrics
        self._traces = traces
        self._prompts = prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status, request_id, whole = 0, "", False
        handles: list[Handle] = []
        token = _submitted.set(handles)

        async def answer(message: Message) -> None:
            nonlocal status, request_id, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = dict(message["headers"]).get(b"x-request-id", b"").decode("latin-1")
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            whole = whole or (ended and status != _CLIENT_GONE)

        spans = self._traces.answering(scope["method"], scope["headers"]) if self._traces else nullcontext()
        error = ""
        with spans as span:
            try:
                await self._app(scope, receive, answer)
            except BaseException as raised:
                error = type(raised).__name__
                if isinstance(raised, Exception):
                    _log.error("an answer was cut off", exc_info=raised)
                raise
            finally:
                _submitted.reset(token)
                route = self._route(scope["path"].removeprefix(scope.get("root_path", "")))
                self._metrics.answered(scope["method"], route, status)
                if span is not None:
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.response.status_code", status)
                line = RequestLine(
                    request_id=request_id, method=scope["method"], route=route, status=status,
                    seconds=time.monotonic() - began, client=str(scope["client"][0]) if scope.get("client") else "",
                    error=error, hung_up=not whole,
                )  # fmt: skip
                log_request(self._with_drawing(line, handles))

    def _route(self, path: str) -> str:
        if path in self._routes:
            return path
        return self._routes.get(path.rpartition("/")[0] + "/", "none")

    def _with_drawing(self, line: RequestLine, handles: Sequence[Handle]) -> RequestLine:
        if not handles:
            return line
        handle = handles[-1]
        times = handle.times
        return replace(
            line, model=handle.model, images=sum(each.n for each in handles), steps=handle.plan.steps,
            schedule=str(handle.plan.schedule), solver=handle.plan.solver.name, priority=handle.priority,
            adapted=handle.adapted or "", queue=times.queued, encode=times.encode, denoise=times.denoise,
            decode=times.decode, outcome=handle.state,
            prompt=str(handle.options.prompt or "")[:_LONGEST_PROMPT] if self._prompts else "",
        )  # fmt: skip
