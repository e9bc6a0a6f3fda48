"""What answers on the port before the engine is ready."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tstitch_trt.serve.access import App, Receive, Scope, Send

__all__ = ["Front"]

_RETRY_SECONDS: Final = 5


class Front:
    """An ASGI application. Until it has one to hand requests to, ``/healthz`` is well, and all else is told to try
    again: ``doing`` says what it waits for. ``root_path``: under which a proxy serves it."""

    def __init__(self, root_path: str = "") -> None:
        self.doing = "starting"
        self._root_path = root_path
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, send)

    async def _answer(self, scope: Scope, send: Send) -> None:
        path = scope["path"].removeprefix(self._root_path)
        status = 503
        answer: dict[str, Any] = {"status": self.doing}
        if path == "/healthz":
            status, answer = 200, {"status": "ok"}
        elif path != "/readyz":
            message = f"the server is not ready: {self.doing}"
            answer = {"error": {"message": message, "type": "server_error", "param": None, "code": "not_ready"}}
        content = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()),
                   (b"cache-control", b"no-store")]  # fmt: skip
        if status == 503:
            headers.append((b"retry-after", str(_RETRY_SECONDS).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content if scope["method"] != "HEAD" else b""})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message: Any = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
