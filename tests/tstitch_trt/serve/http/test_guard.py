"""Who is let in, how much a body may have, and what becomes of clients that leave or send slowly."""

from __future__ import annotations

import base64
import gc
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from support.http_server import Server, eventually, picture_file, post, running, send
from tstitch_engines.errors import BadInput, Busy, Closed, TStitchError
from tstitch_trt.serve.http.auth import Keys
from tstitch_trt.serve.http.limits import HttpLimits, HttpSettings
from tstitch_trt.serve.http.messages import EditRequest
from tstitch_trt.serve.http.options import Pictures

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
KEY, OTHER = "a-key-of-the-tests-1", "a-key-of-the-tests-2"
LONG = {"n": 4, "steps": 1000, "solver": "ddpm"}


@pytest.fixture(scope="module")
def keyed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with keys, of pages elsewhere, and with something to reload."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# of the tests\n\n{KEY}\n{OTHER}\n")
    settings = HttpSettings(
        keys=Keys.read(path), cors_origins=("https://app.example",), root_path="/images", reload=lambda: ["tiny"]
    )
    with running(server.engine, settings) as client:
        yield client


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# --- keys


def test_keys(keyed: httpx.Client) -> None:
    for key in (KEY, OTHER):
        for scheme in ("Bearer", "bearer"):
            assert keyed.get("/v1/models", headers={"authorization": f"{scheme} {key}"}).status_code == 200
    for wrong in ("", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY} {OTHER}", KEY):
        for path in ("/v1/models", GENERATIONS, "/v1/none", "/admin/reload"):
            answer = keyed.request("GET" if path == "/v1/models" else "POST", path, headers={"authorization": wrong})
            assert code(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text
    assert [keyed.get(path).status_code for path in ("/healthz", "/readyz", "/docs", "/openapi.json")] == [200] * 4


def test_only_hashes_of_keys_are_kept() -> None:
    keys = Keys([KEY])
    assert KEY not in repr(vars(keys)) + repr(keys)
    assert (keys.know(KEY), keys.know(OTHER), keys.know("")) == (True, False, False)


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", "with a space in it\n", "é" * 20, "x" * 600])
def test_a_key_file_is_checked(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        Keys.read(path)
    assert not text.strip() or text.strip() not in str(caught.value)
    with pytest.raises(BadInput):
        Keys.read(tmp_path)


# --- pages of other sites, names, proxies


def test_pages_of_other_sites(keyed: httpx.Client, client: httpx.Client) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = keyed.options(GENERATIONS, headers={"origin": "https://app.example", **asking})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://app.example")
    assert keyed.options(GENERATIONS, headers={"origin": "https://evil.example", **asking}).status_code == 400
    answer = keyed.get("/v1/models", headers={"origin": "https://app.example", **key})
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    for one, headers in ((keyed, key), (client, {})):
        files = {"image": b""}  # a form, which browsers send anywhere without asking
        answer = one.post(EDITS, files=files, headers={"origin": "https://evil.example", **headers})
        assert code(answer) == (403, "forbidden")
    own = str(client.base_url).rstrip("/")
    assert client.get("/v1/models", headers={"origin": own}).status_code == 200


def test_names_of_the_server(server: Server) -> None:
    with running(server.engine, HttpSettings(hosts=("localhost", "127.0.0.1", "::1"))) as client:
        for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "evil@localhost", ""):
            assert code(client.get("/v1/models", headers={"host": host})) == (421, "misdirected_request")


def test_a_proxy_in_front(keyed: httpx.Client) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    assert keyed.get("/images/v1/models", headers=key).status_code == 200
    assert code(keyed.get("/images/v1/models"))[0] == 401
    assert keyed.get("/images/healthz").status_code == 200
    assert keyed.get("/openapi.json").json()["servers"] == [{"url": "/images"}]


def test_reloading_is_for_the_machine_itself_or_a_key(server: Server, keyed: httpx.Client) -> None:
    assert keyed.post("/admin/reload", headers={"authorization": f"Bearer {KEY}"}).json() == {"models": ["tiny"]}

    def fail() -> list[str]:
        raise OSError("/secret/path is gone")

    with running(server.engine, HttpSettings(reload=fail, cors_origins=("*",))) as client:
        for headers in ({"host": "evil.example"}, {"x-forwarded-for": "10.0.0.1"}, {"forwarded": "for=10.0.0.1"},
                        {"origin": "https://evil.example"}):  # fmt: skip
            assert code(client.post("/admin/reload", headers=headers)) == (403, "forbidden")
        answer = client.post("/admin/reload")
        assert code(answer) == (500, "internal_error")
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in answer.text


@pytest.mark.parametrize(("error", "status"), [(Busy, 429), (Closed, 503)])
def test_a_reload_that_can_not_run_now(server: Server, error: type[TStitchError], status: int) -> None:
    def fail() -> list[str]:
        raise error("not now", hint="later")

    with running(server.engine, HttpSettings(reload=fail)) as client:
        answer = client.post("/admin/reload")
        told = client.get("/openapi.json").json()["paths"]["/admin/reload"]["post"]["responses"]
    assert answer.status_code == status
    assert int(answer.headers["retry-after"]) > 0
    assert "retry-after" in {name.lower() for name in told[str(status)]["headers"]}


def test_nothing_to_reload(client: httpx.Client) -> None:
    assert code(client.post("/admin/reload")) == (404, "not_found")


@pytest.mark.parametrize(
    "wrong",
    [{"root_path": "images"}, {"root_path": "/images/"}, {"timeout": 0}, {"cors_origins": ("app.example",)}],
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        HttpSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"prompt": 10**9}, {"body_seconds": 0}, {"bodies_bytes": 1}])
def test_limits_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput):
        HttpLimits(**wrong)  # type: ignore[arg-type]


# --- bodies


def answer_to(server: Server, request: bytes) -> bytes:
    with send(server.address, request) as connection:
        return connection.recv(4096)


def test_bodies_that_are_too_large_or_too_slow(server: Server) -> None:
    chunked = {"Transfer_Encoding": "chunked", "Content_Length": ""}
    big = b"%x\r\n%b\r\n0\r\n\r\n" % (60_000, bytes(60_000))
    for request in (post(b"", Content_Length="60000"), post(b"", Content_Length="9" * 18), post(big, **chunked)):
        assert b" 413 " in answer_to(server, request)
    for slow in (post(b"{", Content_Length="9"), post(b"9\r\n{", **chunked), post(b"", path=EDITS, Content_Length="9")):
        assert b" 408 " in answer_to(server, slow)


def test_bodies_share_a_bound(server: Server) -> None:
    limits = HttpLimits(json_bytes=1000, body_bytes=1000, bodies_bytes=1000, body_seconds=20)
    with running(server.engine, HttpSettings(limits=limits)) as client:
        address = ("127.0.0.1", client.base_url.port or 0)
        with send(address, post(b"{", Content_Length="900")):
            assert eventually(lambda: client.post(GENERATIONS, json={"user": "x" * 200}).status_code == 429)
            assert client.post(GENERATIONS, json={"steps": 1}).status_code == 200
            with send(address, post(b"2\r\n{}\r\n0\r\n\r\n", Transfer_Encoding="chunked", Content_Length="2")) as lying:
                assert b" 429 " in lying.recv(4096)
        assert eventually(lambda: client.post(GENERATIONS, json={"user": "x" * 200, "steps": 1}).status_code == 200)


def test_a_websocket_is_none(server: Server) -> None:
    upgrade = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert b"101" not in answer_to(server, upgrade)


# --- clients that leave, and too many


def lanes(server: Server) -> int:
    (model,) = server.engine.state().models.values()
    return model.lanes + model.waiting_images


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "partial_images": 3}])
def test_a_client_that_leaves_frees_its_lanes(server: Server, fields: dict[str, object]) -> None:
    name = f"left-{len(fields)}"
    with send(server.address, post(json.dumps({**LONG, **fields}).encode(), X_Request_ID=name)):
        assert eventually(lambda: lanes(server) == 4)
    assert eventually(lambda: lanes(server) == 0)
    assert server.handles[name].state == "cancelled"


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_what_was_sent_is_not_held_while_it_is_drawn(server: Server, fields: dict[str, object]) -> None:
    picture = base64.b64encode(picture_file(np.zeros((8, 8, 3), np.uint8))).decode()
    body = {**LONG, "strength": 1, "images": [{"image_url": f"data:image/png;base64,{picture}"}], **fields}

    def held() -> list[object]:
        return [each for each in gc.get_objects() if type(each) in (Pictures, EditRequest)]

    with ExitStack() as opened:
        for _ in range(4):  # 8 images are drawn and 8 wait
            opened.enter_context(send(server.address, post(json.dumps(body).encode(), path=EDITS)))
        assert eventually(lambda: lanes(server) == 16)
        assert eventually(lambda: not held())
        assert lanes(server), "some are still to be drawn"
    assert eventually(lambda: lanes(server) == 0)


def test_a_full_queue_says_when_to_come_again(server: Server, client: httpx.Client) -> None:
    body = json.dumps(LONG).encode()
    opened = [send(server.address, post(body)) for _ in range(4)]  # 8 images are drawn and 8 wait
    try:
        assert eventually(lambda: lanes(server) == 16)
        refused = client.post(GENERATIONS, json=LONG)
        assert code(refused) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert 0 < int(refused.headers["retry-after-ms"]) <= 1000 * int(refused.headers["retry-after"])
    finally:
        for connection in opened:
            connection.close()
    assert eventually(lambda: lanes(server) == 0)
    assert client.post(GENERATIONS, json={"steps": 1}).status_code == 200
