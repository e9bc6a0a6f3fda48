"""What may be asked for, and what every other request is told."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from support.http_server import Server, picture_file, post, running, send
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.http.limits import HttpLimits, HttpSettings

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PICTURE = picture_file(np.zeros((8, 8, 3), np.uint8))


def error(answer: httpx.Response) -> dict[str, Any]:
    """Of an answer in OpenAI's shape."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    (name,) = answer.json()
    found = answer.json()[name]
    assert (name, set(found)) == ("error", {"message", "type", "param", "code"})
    assert not {"Traceback", "/tmp", "site-packages"} & set(found["message"].split())  # noqa: S108
    return dict(found)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "1", "stepz": 3}, "stepz", "did you mean 'steps'"),
        ({"prompt": "x" * 8001}, "prompt", "allowed are 8,000"),
        ({"prompt": "boot"}, "class_labels", "0 to 9"),
        ({"prompt": "1", "class_labels": 2}, None, "both prompt and class_labels"),
        ({"class_labels": 10}, "class_labels", "0 to 9"),
        ({"class_labels": list(range(5))}, "class_labels", "allowed are 4"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"n": 0}, "n", "allowed is from 1"),
        ({"n": "2"}, "n", "expected `int"),
        ({"steps": 1001}, "steps", "from 1 to 1000"),
        ({"solver": "dimm"}, "solver", "did you mean 'ddim'"),
        ({"fraction": 1.5}, "fraction", "from 0 to 1"),
        ({"fraction": 0.5, "rounding": "up"}, "rounding", "unknown rounding 'up'"),
        ({"schedule": "small:2,large", "rounding": "lcm"}, "rounding", "no fractions"),
        ({"fraction": 0.5, "schedule": "small,large"}, None, "one of the two"),
        ({"schedule": "tiny,large"}, None, "small"),
        ({"guidance": 101}, "guidance", "from 0 to 100"),
        ({"schedule": "small:1:g=2,large:g=1e3"}, "schedule", "from 0 to 100"),
        ({"schedule": "small:1:g=x,large"}, "schedule", "can't be read"),
        ({"seed": -1}, "seed", "from 0"),
        ({"seed": 2**64}, "seed", "2**64 - 1"),
        ({"priority": 11}, "priority", "from -10 to 10"),
        ({"latency_budget_ms": 0}, "latency_budget_ms", "above 0"),
        ({"negative_prompt": "dull"}, "negative_prompt", "draws classes"),
        ({"size": "9x8"}, "size", "8 x 8"),
        ({"size": "8by8"}, "size", "WIDTHxHEIGHT"),
        ({"size": "99999x99999"}, "size", "8 x 8"),
        ({"quality": "high"}, "quality", "say steps"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"response_format": "url"}, "response_format", "pictures are in the answer"),
        ({"output_format": "gif"}, "output_format", "png, jpeg"),
        ({"output_compression": 50}, "output_compression", "png"),
        ({"style": "vivid"}, "style", "say it in the prompt"),
        ({"svg": {"model": "x"}}, "svg", "png, jpeg or webp"),
        ({"input_fidelity": "high"}, "input_fidelity", "strength"),
        ({"partial_images": 2}, "partial_images", "stream=true"),
        ({"stream": True, "partial_images": 4}, "partial_images", "from 0 to 3"),
        ({"stream": "yes"}, "stream", "expected `bool"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_can_not_be_right_is_a_400_that_says_what_is(
    client: httpx.Client, body: dict[str, Any], param: str | None, words: str
) -> None:
    answer = client.post(GENERATIONS, json=body)
    found = error(answer)
    assert (answer.status_code, found["type"], found["param"]) == (400, "invalid_request_error", param)
    assert words in found["message"]
    assert "\nhint: " in found["message"]


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b"[1]", "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b"[" * 40_000, "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b'{"n":1,"n":2}', "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b'{"seed":1e999}', "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b'{"prompt":"\xff"}', "headers": {"content-type": "application/json"}}, 400, "invalid_json"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"content": b"{}"}, 415, "unsupported_media_type"),
        ({"files": {"image": PICTURE}}, 415, "unsupported_media_type"),
        ({"json": {"prompt": " " * 50_001}}, 413, "request_too_large"),
        ({"json": {"model": "tinny"}}, 404, "model_not_found"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bodies_that_are_no_request(client: httpx.Client, request_: dict[str, Any], status: int, code: str) -> None:
    answer = client.post(GENERATIONS, **request_)
    assert (answer.status_code, error(answer)["code"]) == (status, code)


def test_addresses_and_methods_that_are_none(client: httpx.Client) -> None:
    assert (client.get("/v1/nothing").status_code, error(client.get("/v1/nothing"))["code"]) == (404, "not_found")
    answer = client.get(GENERATIONS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "use POST" in error(answer)["message"]


# --- pictures


def edit(client: httpx.Client, image: bytes, mask: bytes | None = None, **fields: str) -> httpx.Response:
    files = {"image": ("a", image)} | ({} if mask is None else {"mask": ("m", mask)})
    return client.post(EDITS, files=files, data={"prompt": "1", "steps": "4", **fields})


def header_of(width: int, height: int) -> bytes:
    """A PNG of few bytes that says it has so many pixels."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + PICTURE[33:]


GREY = picture_file(np.zeros((8, 8), np.uint16))
CLEAR = picture_file(np.zeros((8, 8, 4), np.uint8))
SOLID = picture_file(np.full((8, 8, 4), 255, np.uint8))


@pytest.mark.parametrize(
    ("image", "mask", "param", "words"),
    [
        (b"no picture", None, "image", "allowed are PNG, JPEG and WebP"),
        (b"", None, "image", "allowed are PNG"),
        (picture_file(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))[:90], None, "image", "damaged"),
        (picture_file(np.zeros((8, 8, 3), np.uint8), "TIFF"), None, "image", "allowed are PNG"),
        (picture_file(np.zeros((8, 8, 3), np.uint8), "GIF"), None, "image", "allowed are PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", None, "image", "allowed are PNG"),
        (header_of(60_000, 60_000), None, "image", "pixels; allowed are 10,000"),
        (header_of(101, 100), None, "image", "10,100 pixels; allowed are 10,000"),
        (GREY, None, "image", "more than 8 bits"),
        (picture_file(np.zeros((9, 8, 3), np.uint8)), None, "size", "height 9"),
        (PICTURE, PICTURE, "mask", "no alpha channel"),
        (PICTURE, SOLID, "mask", "transparent nowhere"),
        (PICTURE, picture_file(np.zeros((9, 8, 4), np.uint8)), "mask", "8x9 pixels and image 8x8"),
        (PICTURE, header_of(60_000, 60_000), "mask", "allowed are 10,000"),
    ],
)
def test_pictures_that_are_not_taken(
    client: httpx.Client, image: bytes, mask: bytes | None, param: str, words: str
) -> None:
    answer = edit(client, image, mask)
    found = error(answer)
    assert (answer.status_code, found["param"]) == (400, param)
    assert words in found["message"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats_of_pictures_that_are_taken(client: httpx.Client, kind: str) -> None:
    picture = picture_file(np.full((24, 16, 3), 99, np.uint8), kind)
    assert edit(client, picture, size="8x8").status_code == 200


def test_a_picture_of_odd_proportions_is_not_made_huge_on_its_way(client: httpx.Client) -> None:
    tall = picture_file(np.zeros((10_000, 1, 3), np.uint8))
    answer = edit(client, tall, size="8x8")
    assert (answer.status_code, error(answer)["param"]) == (400, "image")


def test_forms_that_are_no_edit(client: httpx.Client) -> None:
    for files, data, param in (
        ({}, {"prompt": "1"}, None),
        ({"mask": ("m", CLEAR)}, {"prompt": "1"}, "image"),
        ({"image": ("a", PICTURE), "other": ("b", PICTURE)}, {}, "other"),
        ({"image": ("a", PICTURE)}, {"n": "two"}, "n"),
        ({"image": ("a", PICTURE)}, {"n": ["1", "1"]}, "n"),
        ({"image": ("a", PICTURE)}, {"class_labels": "1", "class_labels[]": "1"}, "class_labels"),
        ({"image": ("a", PICTURE)}, {"class_labels[]": "1", "class_labels": "1"}, "class_labels"),
        ({"image": ("a", PICTURE)}, {"strength": "0"}, "strength"),
        ({"image": ("a", PICTURE)}, {"image[]": "text"}, "image"),
        ([("image[]", ("a", PICTURE)), ("image[]", ("b", PICTURE))], {}, "image"),
    ):
        answer = client.post(EDITS, files=files, data=data)
        assert (answer.status_code, error(answer)["param"]) == (400 if files else 415, param), (files, data)
    broken = client.post(EDITS, content=b"--x\r\n\r\n", headers={"content-type": "multipart/form-data; boundary=y"})
    assert error(broken)["type"] == "invalid_request_error"
    assert client.post(EDITS, files={"image": ("a", bytes(400_000))}).status_code == 413


def test_an_edit_as_json_equals_the_form(client: httpx.Client) -> None:
    import base64

    url = {"image_url": f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"}
    clear = {"image_url": f"data:image/png;base64,{base64.b64encode(CLEAR).decode()}"}
    body = {"prompt": "1", "steps": 4, "seed": 5, "images": [url], "mask": clear}
    answer = client.post(EDITS, json=body)
    form = edit(client, PICTURE, CLEAR, seed="5")
    assert answer.json()["data"] == form.json()["data"]
    large = {**body, "images": [{"image_url": url["image_url"] + "A" * 60_000}]}  # zeros after the picture's end
    assert client.post(EDITS, json=large).json()["data"] == answer.json()["data"]
    for wrong, words in (
        ({"images": []}, "images"),
        ({"images": [url, url]}, "2 pictures were sent"),
        ({"images": [{"image_url": "http://localhost/a.png"}]}, "not fetched"),
        ({"images": [{"image_url": "data:image/png;base64,?"}]}, "no base64"),
        ({"images": [{"file_id": "x"}]}, "file_id"),
        ({"mask": url}, "no alpha"),
    ):
        refused = client.post(EDITS, json={**body, **wrong})
        assert refused.status_code == 400
        assert words in error(refused)["message"], wrong
    assert error(client.post(EDITS, json={**large, "stepz": 3}))["code"] == "unknown_parameter"
    assert error(client.post(EDITS, json={**large, "steps": "3"}))["param"] == "steps"


# --- answers


@pytest.mark.parametrize(
    ("accept", "fields", "kind"),
    [
        ("image/png", {}, "PNG"),
        ("image/*", {"output_format": "webp"}, "WEBP"),
        ("image/webp;q=0.5, image/jpeg", {"output_compression": 30}, "JPEG"),
        ("application/json;q=0.1, image/png;q=0.2", {}, "PNG"),
    ],
)
def test_the_picture_alone(
    server: Server, client: httpx.Client, accept: str, fields: dict[str, Any], kind: str
) -> None:
    body = {"prompt": "3", "steps": 4, "seed": 9, **fields}
    answer = client.post(GENERATIONS, json=body, headers={"accept": accept})
    assert answer.headers["content-type"] == f"image/{kind.lower()}"
    with Image.open(BytesIO(answer.content)) as picture:
        assert (picture.format, picture.size) == (kind, (8, 8))
        if kind == "PNG":
            alone = server.alone.sample(labels=[3], steps=4, seed=9)
            np.testing.assert_array_equal(np.asarray(picture), alone.images[0])
    said = {name: value for name, value in answer.headers.items() if name.startswith("x-tstitch-")}
    assert said == {
        "x-tstitch-model": "tiny", "x-tstitch-seed": "9", "x-tstitch-steps": "4", "x-tstitch-solver": "ddim",
        "x-tstitch-schedule": "small[0:2] large[2:4]",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("accept", "fields", "param"),
    [
        ("image/png", {"n": 2}, "n"),
        ("image/png", {"stream": True}, "stream"),
        ("image/png", {"output_format": "jpeg"}, "output_format"),
    ],
)
def test_a_picture_alone_that_can_not_be(client: httpx.Client, accept: str, fields: dict[str, Any], param: str) -> None:
    answer = client.post(GENERATIONS, json=fields, headers={"accept": accept})
    assert (answer.status_code, error(answer)["param"]) == (400, param)


@pytest.mark.parametrize("accept", ["*/*", "application/json, image/png;q=0.5", "text/html", "image/png;q=0", ";;,q=x"])
def test_json_for_everybody_else(client: httpx.Client, accept: str) -> None:
    answer = client.post(GENERATIONS, json={"steps": 1}, headers={"accept": accept})
    assert answer.headers["content-type"] == "application/json"


def test_a_request_id_is_kept_where_it_is_one(server: Server, client: httpx.Client) -> None:
    own = client.post(GENERATIONS, json={"steps": 1}, headers={"x-request-id": "mine-1"})
    assert (own.headers["x-request-id"], own.json()["tstitch"]["request_id"]) == ("mine-1", "mine-1")
    assert server.handles["mine-1"].state == "done"
    other = client.get("/healthz", headers={"x-request-id": "a b\tc"})
    assert len(other.headers["x-request-id"]) == 32


def test_the_page_loads_nothing(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not any(word in page.text for word in ("<script", "http://", "https://", " src="))
    assert all(word in page.text for word in ("/v1/images/edits", "latency_budget_ms", "Retry-After"))


# --- whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["prompt", "n", "size", "steps", "seed", "class_labels", "stream", "guidance", "schedule",
                         "images", "mask", "solver", "priority", "output_format", "strength", "svg"])  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(max_size=200) | st.dictionaries(NAMES, JSON, max_size=5).map(lambda data: json.dumps(data).encode()),
    path=st.sampled_from([GENERATIONS, EDITS]),
    kind=st.sampled_from(["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "", "a/b"]),
    accept=st.sampled_from(["*/*", "image/png", "image/*;q=0.1,,"]) | st.text("aq/*;,=.01", max_size=12),
)
def test_garbage_is_never_an_error_of_the_server(
    client: httpx.Client, body: bytes, path: str, kind: str, accept: str
) -> None:
    answer = client.post(path, content=body, headers={"content-type": kind, "accept": accept})
    assert answer.status_code < 500
    if answer.status_code >= 400:
        error(answer)


def test_requests_that_are_no_http(server: Server) -> None:
    for request in (b"\x00\x01\r\n\r\n", b"POST / HTTP/9\r\n\r\n", b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n"):
        with send(server.address, request) as connection:
            assert b" 400 " in connection.recv(100)
    with send(server.address, post(b"{}", Content_Length="x")) as connection:
        assert b" 400 " in connection.recv(100)


def test_a_time_out_is_a_504_and_its_lanes_are_free(server: Server) -> None:
    with running(server.engine, HttpSettings(timeout=0.1, limits=HttpLimits(steps=1000))) as client:
        answer = client.post(
            GENERATIONS, json={"n": 4, "steps": 1000, "solver": "ddpm"}, headers={"x-request-id": "late"}
        )
    assert (answer.status_code, error(answer)["code"]) == (504, "timeout")


def test_what_is_told_while_it_starts_and_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(server.alone.bundle.root) as engine, running(engine, HttpSettings()) as client:

        def refused(problem: str) -> None:
            for answer in (client.get("/readyz"), client.post(GENERATIONS, json={})):
                assert (answer.status_code, error(answer)["code"]) == (503, problem)
                assert answer.headers["retry-after"] == "5"
            assert client.get("/healthz").status_code == 200

        with monkeypatch.context() as warming:  # which is over too soon to be seen
            warming.setattr(engine, "state", lambda: replace(Engine.state(engine), ready=False))
            refused("starting")
        assert client.get("/readyz").status_code == 200
        assert client.post(GENERATIONS, json={"steps": 1}).status_code == 200
        engine.drain()
        refused("ending")
