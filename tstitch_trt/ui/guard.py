"""What of the page's server can be reached, by whom: everything that is not named here is refused."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qs

import msgspec

from tstitch_engines.bundle.decode import DecodeError
from tstitch_engines.bundle.read import read_text
from tstitch_engines.errors import BadInput
from tstitch_trt.serve.listen import is_address, is_loopback
from tstitch_trt.ui.visitors import Bucket, Visitors

__all__ = ["MOST_BYTES", "Guard", "read_token"]

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BYTES: Final = 64 << 10
"""Of a request's body."""

_SESSION: Final = r"[A-Za-z0-9_-]{6,64}"
_PAGES: Final = re.compile(
    r"/|/config|/theme\.css|/gradio_api/theme\.css|/favicon\.ico|/manifest\.json|/gradio_api/queue/data"
    rf"|/gradio_api/heartbeat/{_SESSION}|/(assets|static)/(?!.*\.\.)[\w./-]{{1,200}}"
)
_JOIN: Final = "/gradio_api/queue/join"
_DATA: Final = "/gradio_api/queue/data"
_FILE: Final = "/gradio_api/file="
_PICTURE: Final = re.compile(r"[0-9a-f]{32}\.png")
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_BODY_SECONDS: Final = 10.0
_LONGEST_TOKEN: Final = 512
_SHORTEST_TOKEN: Final = 16

# Gradio's page has scripts and styles in its text; it needs nothing from elsewhere.
_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Scalar = Annotated[str, msgspec.Meta(max_length=20_000)] | float | Whole | bool | None
Value = Scalar | Annotated[list[float], msgspec.Meta(max_length=16)]


class _Join(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The body of an event. Values are plain: no objects, which Gradio could take for files to fetch."""

    data: Annotated[list[Value], msgspec.Meta(max_length=16)]
    fn_index: Annotated[int, msgspec.Meta(ge=0, lt=1000)]
    session_hash: Annotated[str, msgspec.Meta(pattern=f"^{_SESSION}$")]
    trigger_id: Annotated[int, msgspec.Meta(ge=0, lt=1_000_000)] | None = None
    event_data: Scalar = None  # what a text became; it is in ``data`` as well, and not passed on


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        self.status, self.text = status, text


class Guard:
    """An ASGI application around Gradio's. ``token``: what a visitor must know, ``None`` for nothing.

    ``host`` and ``port``: where it listens. ``names``: further values of the header Host, with or without a port.
    ``pictures``: the folder whose pictures it may show. ``events``: the number of values of each event.
    """

    def __init__(
        self, app: App, *, host: str, port: int, names: Iterable[str], token: str | None, pictures: Path,
        visitors: Visitors, events: Mapping[int, int],
    ) -> None:  # fmt: skip
        self._app = app
        self._events = events
        self._port = port
        self._token = token
        self._session = secrets.token_urlsafe(32)
        self._cookie = f"tstitch-{port}"
        self._pictures = str(pictures)
        self._visitors = visitors
        self._any_address = not is_loopback(host)
        self._own = {"localhost", host.lower()} | (
            {socket.gethostname().lower()} if self._any_address else {"127.0.0.1", "::1"}
        )
        self._names = {name.lower() for name in names}
        self._joins = Bucket(60, 10)
        self._tries = Bucket(10, 1 / 6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        began = False

        async def answer(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                own = [
                    (name, value)
                    for name, value in message["headers"]
                    if name.decode("latin-1").lower() not in _HEADERS
                ]
                message = {**message, "headers": [*own, *((n.encode(), v.encode()) for n, v in _HEADERS.items())]}
            await send(message)

        try:
            await self._serve(scope, receive, answer)
        except _Refused as refused:
            await _say(answer, refused.status, refused.text)
        except Exception:
            # Gradio raises in the middle of its answer to a page that it does not know: no news for the log
            _log.log(logging.DEBUG if began else logging.ERROR, "%s %r", scope["method"], scope["path"], exc_info=True)
            if began:
                await send({"type": "http.response.body", "body": b""})
            else:
                await _say(answer, 500, "an error of the server, which its log describes")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _single(scope["headers"])
        method, path = scope["method"], scope["path"]
        host = self._check_host(headers.get("host", ""))
        self._check_origin(headers, host, navigating=method == "GET" and path == "/")
        if await self._let_in(scope, headers, send):
            return
        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _passed_on(name, value)]}
        if method in ("GET", "HEAD") and (_PAGES.fullmatch(path) or self._is_picture(path)):
            if path != _DATA:
                await self._app(scope, receive, send)
                return
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
            with self._visitors.listening(session):
                await self._app(scope, receive, send)
        elif method == "POST" and path == _JOIN:
            if not self._joins.take(_address(scope)):
                raise _Refused(429, "too many requests from this address; wait some seconds")
            await self._app(scope, _replay(await self._read_join(headers, receive), receive), send)
        else:
            raise _Refused(404, "this page has no such address")

    def _check_host(self, host: str) -> str:
        found = _HOST.fullmatch(host.lower())
        if found is not None:
            name, port = found[1].strip("[]"), int(found[2] or 80)
            own = name in self._own or (self._any_address and is_address(name))
            if (own and port == self._port) or {found[1], host.lower()} & self._names:
                return host.lower()
        raise _Refused(
            421, "this page is not served under that name; whoever started it may allow it: --allow-host NAME"
        )

    def _check_origin(self, headers: dict[str, str], host: str, *, navigating: bool) -> None:
        """Refuses what pages of other sites send. A link to this page from elsewhere is allowed."""
        origin = headers.get("origin")
        foreign = origin is not None and origin.lower().removeprefix("https://").removeprefix("http://") != host
        if foreign or (headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not navigating):
            raise _Refused(403, "another site's page sent this")

    async def _let_in(self, scope: Scope, headers: dict[str, str], send: Send) -> bool:
        """Whether the request was answered: one that brought the token. Raises for those that have none."""
        if self._token is None:
            return False
        cookies = dict(pair.strip().partition("=")[::2] for pair in headers.get("cookie", "").split(";"))
        if _same(cookies.get(self._cookie, ""), self._session):
            return False
        query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=8) if scope["path"] == "/" else {}
        if scope["method"] != "GET" or "token" not in query:
            raise _Refused(401, "open the address with ?token=... that tstitch-trt ui printed when it started")
        address = _address(scope)
        if not self._tries.take(address, cost=0):
            raise _Refused(429, "too many wrong tokens from this address; wait a minute")
        if not _same(query["token"][0], self._token):
            self._tries.take(address)
            raise _Refused(401, "this token is wrong; tstitch-trt ui printed the right one when it started")
        secure = "; Secure" if headers.get("x-forwarded-proto") == "https" else ""
        cookie = f"{self._cookie}={self._session}; HttpOnly; SameSite=Strict; Path=/{secure}"
        # Not a redirect: after one from another site's link, browsers would leave the cookie out.
        await _say(send, 200, '<meta http-equiv="refresh" content="0; url=/">', kind="text/html", cookie=cookie)
        return True

    def _is_picture(self, path: str) -> bool:
        folder, _, name = path.removeprefix(_FILE).rpartition("/")
        return path.startswith(_FILE) and folder == self._pictures and _PICTURE.fullmatch(name) is not None

    async def _read_join(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The body of an event, checked and written anew."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(415, "events are application/json")
        too_large = _Refused(413, f"the body is too large; allowed are {MOST_BYTES} bytes")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > MOST_BYTES:
            raise too_large
        body, more = b"", True
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _Refused(400, "the body was cut off")
                    body, more = body + message.get("body", b""), message.get("more_body", False)
                    if len(body) > MOST_BYTES:
                        raise too_large
        except TimeoutError:
            raise _Refused(408, f"the body did not come within {_BODY_SECONDS:g} s") from None
        try:
            join = msgspec.json.decode(body, type=_Join)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise _Refused(422, f"this event can't be read: {error}") from None
        if (wanted := self._events.get(join.fn_index)) is None:
            raise _Refused(422, f"this page has no event {join.fn_index}")
        if len(join.data) != wanted:
            raise _Refused(422, f"event {join.fn_index} has {len(join.data)} values; needed are {wanted}")
        return msgspec.json.encode(msgspec.structs.replace(join, event_data=None))


def read_token(path: Path) -> str:
    """The token in a file. Raises ``BadInput`` where it is too short, too long or of characters that no address has."""
    hint = "make one: python -c 'import secrets; print(secrets.token_urlsafe())' > token.txt"
    try:
        token = read_text(path, 4 * _LONGEST_TOKEN).strip()
    except (OSError, DecodeError) as error:
        problem = error.message if isinstance(error, DecodeError) else error.strerror
        raise BadInput(f"--token-file {path} can't be read: {problem}", hint=hint) from None
    if not re.fullmatch(rf"[A-Za-z0-9_.~-]{{{_SHORTEST_TOKEN},{_LONGEST_TOKEN}}}", token):
        raise BadInput(
            f"--token-file {path} holds no token: {len(token)} characters; allowed are {_SHORTEST_TOKEN} to "
            f"{_LONGEST_TOKEN} letters, digits and _ . ~ -",
            hint=hint,
        )
    return token


def _same(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _address(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""


def _single(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        key = name.decode("latin-1").lower()
        if key in ("host", "origin", "content-length", "content-type") and key in found:
            raise _Refused(400, f"the header {key} was sent twice")
        found[key] = f"{found[key]}; {value.decode('latin-1')}" if key in found else value.decode("latin-1")
    return found


def _passed_on(name: bytes, value: bytes) -> bool:
    """Gradio makes addresses out of the headers of proxies. Of those it gets the scheme alone."""
    key = name.lower()
    return (key == b"x-forwarded-proto" and value in (b"http", b"https")) or not key.startswith((b"x-", b"forwarded"))


def _replay(body: bytes, receive: Receive) -> Receive:
    """``body`` as the request's, then what else comes: that the visitor left."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _say(send: Send, status: int, text: str, *, kind: str = "application/json", cookie: str = "") -> None:
    # Gradio's page shows the word "detail" of an answer that is no success
    body = msgspec.json.encode({"detail": text}) if kind == "application/json" else text.encode()
    headers = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"content-length", str(len(body)).encode())]
    headers += [(b"cache-control", b"no-store")] + ([(b"set-cookie", cookie.encode())] if cookie else [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
