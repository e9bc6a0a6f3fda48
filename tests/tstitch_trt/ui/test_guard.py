"""The guard around the page's server, alone: who gets in, under which names, and what is passed on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tstitch_engines.errors import BadInput
from tstitch_trt.ui.guard import MOST_BYTES, Guard, read_token
from tstitch_trt.ui.visitors import Visitors

TOKEN = "a-token-of-the-test"  # noqa: S105
JOIN = "/gradio_api/queue/join"
BODY = {"data": [1, "a", None, [0.5]], "fn_index": 2, "session_hash": "abc123def"}


class Reached:
    """An application that notes what reached it and answers 200."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"ALLOW")]})
        await send({"type": "http.response.body", "body": b"reached"})


def guard(app: Any, host: str = "127.0.0.1", *, token: str | None = None, names: tuple[str, ...] = ()) -> Guard:
    pictures = Path("/tmp/pictures")  # noqa: S108 - nothing is written
    return Guard(
        app, host=host, port=7860, names=names, token=token, pictures=pictures, visitors=Visitors(), events={2: 4}
    )


def ask(
    served: Guard, path: str = "/", method: str = "GET", *, query: str = "", body: bytes | list[bytes] = b"",
    headers: Mapping[str, str] | None = None, address: str = "10.0.0.1",
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """Status, headers and body of the answer. Headers with the value "" are left out."""
    given_ = {"host": "127.0.0.1:7860", **(headers or {})}
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(), "client": (address, 1),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given_.items() if value],
    }  # fmt: skip
    chunks = [body] if isinstance(body, bytes) else list(body)
    sent: list[Any] = []

    async def receive() -> Any:
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(served(scope, receive, send))
    found = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message["body"] for message in sent[1:])


def join(served: Guard, body: bytes | list[bytes], **headers: str) -> tuple[int, dict[str, str], bytes]:
    return ask(served, JOIN, "POST", body=body, headers={"content-type": "application/json", **headers})


@pytest.mark.parametrize(
    ("host", "right", "wrong"),
    [
        (
            "127.0.0.1",
            ["127.0.0.1:7860", "localhost:7860", "LOCALHOST:7860", "[::1]:7860"],
            ["", "evil.example:7860", "127.0.0.1", "127.0.0.1:80", "localhost.evil.example:7860", "10.0.0.1:7860",
             "localhost:7860@evil.example", "localhost:7860/", "[::1", "127.0.0.1:7860, evil.example", "a" * 5000],
        ),
        (
            "0.0.0.0",  # noqa: S104 - who asks by a number was not led here by a name
            ["10.1.2.3:7860", "[fe80::1]:7860", "localhost:7860"],
            ["evil.example:7860", "10.1.2.3", "10.1.2.3.evil.example:7860"],
        ),
        ("gpu.lan", ["gpu.lan:7860", "10.1.2.3:7860"], ["evil.lan:7860"]),
    ],
)  # fmt: skip
def test_only_the_names_that_it_serves_are_answered(host: str, right: list[str], wrong: list[str]) -> None:
    """A name of a stranger that leads here (DNS rebinding) is none of them."""
    app = Reached()
    for name in right:
        assert ask(guard(app, host), headers={"host": name})[0] == 200, name
    reached = len(app.scopes)
    for name in wrong:
        status, _, body = ask(guard(app, host), headers={"host": name})
        assert status == 421, name
        assert b"--allow-host" in body
    assert len(app.scopes) == reached


def test_further_names_may_be_allowed() -> None:
    served = guard(Reached(), names=("Gpu.Example", "tunnel:8888"))
    for name, status in (("gpu.example", 200), ("gpu.example:443", 200), ("tunnel:8888", 200), ("tunnel:99", 421)):
        assert ask(served, headers={"host": name})[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:7860"},  # another name of the same server
        {"origin": "http://127.0.0.1:8080"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},  # another port of this machine
    ],
)
def test_what_other_sites_pages_send_is_refused(headers: dict[str, str]) -> None:
    app = Reached()
    assert join(guard(app), json.dumps(BODY).encode(), **headers)[0] == 403
    assert ask(guard(app), "/config", headers=headers)[0] == 403
    assert not app.scopes
    assert join(guard(app), json.dumps(BODY).encode(), origin="http://127.0.0.1:7860")[0] == 200
    assert ask(guard(app), "/", headers={"sec-fetch-site": "cross-site"})[0] == 200  # a link


def test_with_a_token_nothing_is_answered_without_it() -> None:
    app = Reached()
    served = guard(app, token=TOKEN)
    for path in ("/", "/config", "/assets/a.js", "/gradio_api/queue/data", "/nowhere"):
        assert ask(served, path)[0] == 401
        assert ask(served, path, headers={"cookie": "tstitch-7860=x; tstitch-7860="})[0] == 401
    assert join(served, json.dumps(BODY).encode())[0] == 401
    assert ask(served, query="token=wrong")[0] == 401
    assert ask(served, "/config", query=f"token={TOKEN}")[0] == 401
    assert not app.scopes
    status, headers, body = ask(served, query=f"token={TOKEN}")
    assert (status, app.scopes) == (200, [])
    cookie, _, rest = headers["set-cookie"].partition(";")
    assert rest == " HttpOnly; SameSite=Strict; Path=/"
    assert TOKEN not in cookie
    assert TOKEN.encode() not in body
    assert ask(served, "/config", headers={"cookie": f"other=1; {cookie}"})[0] == 200
    assert ask(guard(app, token=TOKEN), headers={"cookie": cookie})[0] == 401  # of an earlier run
    assert "Secure" in ask(served, query=f"token={TOKEN}", headers={"x-forwarded-proto": "https"})[1]["set-cookie"]


def test_wrong_tokens_are_counted() -> None:
    served = guard(Reached(), token=TOKEN)
    statuses = [ask(served, query=f"token=wrong{index}")[0] for index in range(15)]
    assert statuses == [401] * 10 + [429] * 5
    assert ask(served, query=f"token={TOKEN}")[0] == 429
    assert ask(served, query=f"token={TOKEN}", address="10.0.0.2")[0] == 200


def test_events_of_one_address_are_counted() -> None:
    served = guard(Reached())
    statuses = [join(served, json.dumps(BODY).encode())[0] for _ in range(100)]
    assert statuses[:60] == [200] * 60
    assert statuses[-1] == 429


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[
            ("GET", f"/gradio_api/{path}")
            for path in (
                "info", "openapi.json", "startup-events", "proxy=http://10.0.0.1/", "stream/a/b/c/playlist.m3u8",
                "file=/etc/passwd", "file=/tmp/pictures/../../etc/passwd", "file=http://10.0.0.1/a.png",
                f"file=/tmp/pictures/{'0' * 31}.png", f"file=/tmp/pictures/x/{'0' * 32}.png", "file=", "token",
                f"file=/tmp/other/{'0' * 32}.png", "heartbeat/../config", "heartbeat/", "runs", "vibe-code/",
                f"file=/tmp/pictures/{'0' * 32}.png\n", "deep_link", "app_id", "user",
            )
        ],
        *[
            ("POST", f"/gradio_api/{path}")
            for path in ("upload", "run/drawing", "api/predict", "call/drawing", "call/v2/drawing", "cancel", "reset",
                         "component_server", "process_recording", "stream/a", "vibe-edit", "queue/data", "queue/join/")
        ],
        ("GET", "/assets/../config.py"), ("GET", "/assets//etc/passwd/../x"), ("GET", "/svelte/x"), ("GET", "/docs"),
        ("GET", "/monitoring"), ("GET", "//"), ("GET", "/login"), ("POST", "/login"), ("POST", "/"), ("PUT", "/"),
        ("OPTIONS", JOIN), ("GET", JOIN), ("TRACE", "/"), ("GET", "/custom_component/a/b/c/d"), ("GET", "/\r\n"),
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_off(method: str, path: str) -> None:
    app = Reached()
    assert ask(guard(app), path, method)[0] == 404
    assert not app.scopes


def test_what_a_changed_text_says_of_itself_is_not_passed_on() -> None:
    app = Reached()
    assert join(guard(app), json.dumps({**BODY, "event_data": "a red fox"}).encode())[0] == 200
    assert "event_data" not in json.loads(app.bodies[0])


def test_the_page_s_own_pictures_are_shown() -> None:
    assert ask(guard(Reached()), f"/gradio_api/file=/tmp/pictures/{'0f' * 16}.png")[0] == 200


def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(Reached())({"type": "websocket", "path": "/"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_bodies_are_bounded_and_plain() -> None:
    app = Reached()
    plain = {**BODY, "data": [1, "a", None, 2]}

    def refused(status: int, body: bytes | list[bytes], **headers: str) -> None:
        found, _, said = join(guard(app), body, **headers)
        assert found == status, said
        assert not app.scopes

    refused(413, b"[" * (MOST_BYTES + 1))
    refused(413, [b"[" * 1000] * 100)
    for length in (str(MOST_BYTES + 1), "9" * 5000, "-1", "x", "1e3"):
        refused(413, b"{}", **{"content-length": length})
    refused(415, json.dumps(BODY).encode(), **{"content-type": "text/plain"})
    for body in (b"", b"[" * 60_000, b'{"data":[NaN]}', b"\xff", b"null"):
        refused(422, body)
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for change in (
        {"fn_index": 10**9}, {"fn_index": 3}, {"fn_index": -1}, {"fn_index": "2"}, {"fn_index": None},
        {"session_hash": "../../../x"}, {"session_hash": None}, {"event_data": {}}, {"batched": True},
        {"data": [file] * 4}, {"data": [[file]] * 4}, {"data": [1] * 3}, {"data": [1] * 5}, {"data": {}},
        {"data": [[0.5] * 17, 1, 1, 1]}, {"data": ["x" * 20_001, 1, 1, 1]}, {"data": [10**400, 1, 1, 1]},
    ):  # fmt: skip
        refused(422, json.dumps({**plain, **change}).encode())
    assert join(guard(app), [json.dumps(plain).encode()[:9], json.dumps(plain).encode()[9:]])[0] == 200
    assert json.loads(app.bodies[0]) == plain


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tstitch_trt.ui.guard._BODY_SECONDS", 0.05)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:7860"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": JOIN, "headers": headers, "query_string": b"", "client": None}
    asyncio.run(guard(Reached())(scope, never, send))
    assert sent[0]["status"] == 408


def test_of_two_fields_of_one_name_what_was_checked_is_passed_on() -> None:
    app = Reached()
    join(guard(app), json.dumps(BODY).replace('"data"', '"fn_index": 7, "data"').encode())
    assert json.loads(app.bodies[0])["fn_index"] == 2


def test_headers_of_proxies_are_not_passed_on() -> None:
    app = Reached()
    forged = {"x-forwarded-host": "evil", "x-gradio-user": "me", "forwarded": "host=evil", "x-forwarded-proto": "https"}
    headers = ask(guard(app), headers=forged)[1]
    assert dict(app.scopes[0]["headers"]) == {b"host": b"127.0.0.1:7860", b"x-forwarded-proto": b"https"}
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_an_error_of_the_server_is_not_told() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("a secret")

    status, _, body = ask(guard(broken))
    assert status == 500
    assert b"secret" not in body
    assert b"Traceback" not in body


@settings(max_examples=50, deadline=2000)
@given(
    st.binary(max_size=300),
    st.text(max_size=60),
    st.dictionaries(
        st.sampled_from(["host", "origin", "cookie", "content-length", "content-type"]),
        st.text(st.characters(max_codepoint=255), max_size=30),
    ),
)
def test_no_request_is_an_error_of_the_guard(body: bytes, path: str, headers: dict[str, str]) -> None:
    served = guard(Reached(), token=TOKEN)
    for method, where in (("POST", JOIN), ("GET", "/" + path), ("GET", "/")):
        assert ask(served, where, method, body=body, headers=headers, query=path.encode().hex())[0] in (
            200,
            401,
            403,
            421,
        )
    served = guard(Reached())
    found = join(served, body, **{key: value for key, value in headers.items() if key == "content-length"})[0]
    assert found in (413, 422)


def test_a_token_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "token.txt"
    path.write_text(f"{TOKEN}\n")
    assert read_token(path) == TOKEN
    for text in ("", "short", "x" * 600, "with a space in it", "ünicode-is-not-for-addresses", "\0" * 20):
        path.write_text(text)
        with pytest.raises(BadInput, match="token-file"):
            read_token(path)
    for other in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(BadInput, match="token-file"):
            read_token(other)
