"""What stands before the routes: who may call, how much a body may have, and what an error tells."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from tstitch_trt.serve.http.errors import ApiError, ClientGone, error_answer, to_api_error
from tstitch_trt.serve.http.limits import HttpSettings
from tstitch_trt.serve.listen import is_loopback

__all__ = ["Guard", "release_body"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ID: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_ADMIN: Final = "/admin/"
_FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-real-ip")
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """An ASGI application around the routes. Every answer bears ``x-request-id``: the client's own, where it is one."""

    def __init__(self, app: App, settings: HttpSettings) -> None:
        self._app = app
        self._settings = settings
        self._bodies = 0  # bytes that are being read or decoded
        self._hosts = frozenset(host.lower() for host in settings.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        scope["root_path"] = self._settings.root_path or scope.get("root_path", "")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = headers.get("x-request-id", "")
        request_id = asked if _ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        began = False

        async def answer(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                own = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *_HEADERS]
                message = {**message, "headers": own}
            await send(message)

        body = _Body(self, scope, headers, receive)
        try:
            self._check(scope, headers)
            body.begin()
            await self._app(scope, body.receive, answer)
        except ClientGone:
            if not began:  # for logs and counts: nobody reads it
                await _answer(answer, 499, {"content-length": "0"}, b"")
        except Exception as error:
            if began:
                raise
            await _answer(answer, *error_answer(to_api_error(error, request_id)))
        finally:
            body.release()

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises ``ApiError`` for callers that are not let in."""
        settings = self._settings
        path = _path(scope)
        host = headers.get("host", "").lower()
        found = _HOST.fullmatch(host)
        name = found[1].strip("[]") if found else ""
        if self._hosts and not {name, host} & self._hosts:
            raise ApiError(421, "this server is not reached under that name\nhint: whoever runs it may allow it",
                           code="misdirected_request")  # fmt: skip
        origin = headers.get("origin")
        foreign = origin is not None and origin.lower().partition("://")[2] != host
        if foreign and not {"*", origin} & set(settings.cors_origins):
            raise ApiError(403, "a page of another site sent this\nhint: whoever runs the server may allow it with "
                           "--cors-origin")  # fmt: skip
        if settings.keys is not None:
            if path not in settings.open_paths:
                self._check_key(headers.get("authorization", ""))
        elif path.startswith(_ADMIN) and (foreign or not _from_here(scope, headers, name)):
            raise ApiError(403, "this is for the machine itself, or for who has a key\nhint: start the server with "
                           "--api-key-file")  # fmt: skip

    def _check_key(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        problem = "this key is wrong" if key else "the key is missing"
        if scheme.lower() != "bearer" or self._settings.keys is None or not self._settings.keys.know(key.strip()):
            raise ApiError(401, f"{problem}\nhint: send the header Authorization: Bearer KEY", code="invalid_api_key",
                           headers={"www-authenticate": "Bearer"})  # fmt: skip


class _Body:
    """A body as it comes: bounded in bytes and seconds, and counted among all bodies until ``release``."""

    def __init__(self, guard: Guard, scope: Scope, headers: dict[str, str], receive: Receive) -> None:
        limits = guard._settings.limits
        self._guard = guard
        self._receive = receive
        self._headers = headers
        self._most = limits.body_bytes if _path(scope) == "/v1/images/edits" else limits.json_bytes
        self._seconds = limits.body_seconds
        self._end: float | None = None
        self._got = self._held = 0
        self._whole = False
        scope["state"]["release_body"] = self.release

    def begin(self) -> None:
        """Raises ``ApiError`` for one that is too large, or finds no room."""
        said = self._headers.get("content-length", "")
        length = int(said) if said.isascii() and said.isdigit() and len(said) < 20 else None
        if "transfer-encoding" in self._headers:  # which holds, whatever length is said beside it
            length = self._most
        elif length is None:
            length = 0
        if length > self._most:
            raise self._too_large(length)
        if self._guard._bodies + length > self._guard._settings.limits.bodies_bytes:
            raise ApiError(429, "the server reads too many pictures already\nhint: try again", wait=1.0)
        self._held = length
        self._guard._bodies += length

    def release(self) -> None:
        self._guard._bodies -= self._held
        self._held = 0

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._end is None:
            self._end = loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._seconds:g} s\nhint: send it at once",
                           headers={"connection": "close"}) from None  # fmt: skip
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._got += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._got > self._most:
            raise self._too_large(self._got)
        return message

    def _too_large(self, length: int) -> ApiError:
        return ApiError(413, f"the body has {length:,} bytes or more; allowed are {self._most:,}\nhint: send smaller "
                        "pictures or texts")  # fmt: skip


def release_body(scope: Scope) -> None:
    """The body has been read and decoded: another may take its room."""
    scope["state"]["release_body"]()


def _path(scope: Scope) -> Any:
    """Of the route, without the root path of a proxy."""
    path, root = scope["path"], scope["root_path"]
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _from_here(scope: Scope, headers: dict[str, str], name: str) -> bool:
    """Whether this machine asks, for itself: not a proxy on it for others, nor a page under a name of its own."""
    client = scope.get("client")
    try:
        here = client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        here = False
    return here and is_loopback(name) and not any(header in headers for header in _FORWARDED)


async def _answer(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    fields = [(name.encode(), value.encode("latin-1")) for name, value in headers.items() if name != "content-length"]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*fields, length]})
    await send({"type": "http.response.body", "body": body})
