"""A model of texts, beside one of classes: which is asked, with what."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.hand_made_parts import World
from support.http_server import picture_file, running
from support.tiny import TinyPair
from tstitch_trt import Runtime
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.http.limits import HttpSettings

GENERATIONS = "/v1/images/generations"
ASKED: dict[str, Any] = {"steps": 3, "schedule": "plain", "seed": 5, "guidance": 2.0, "negative_prompt": "blurred"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_pair: TinyPair) -> Iterator[tuple[httpx.Client, Runtime]]:
    bundle = World().bundle(tmp_path_factory.mktemp("world"))
    with (
        tstitch_trt.load(bundle, threads=1) as alone,
        Engine({"world": bundle, "tiny": tiny_pair.bundle}, load={"threads": 1}) as engine,
        running(engine, HttpSettings()) as client,
    ):
        yield client, alone


def first(answer: httpx.Response) -> Any:
    with Image.open(BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as picture:
        return np.asarray(picture)


def test_a_prompt(world: tuple[httpx.Client, Runtime]) -> None:
    client, alone = world
    answer = client.post(GENERATIONS, json={"prompt": "a red fox", "size": "64x64", **ASKED})
    expected = alone.sample(prompt="a red fox", height=64, width=64, **ASKED)
    np.testing.assert_array_equal(first(answer), expected.images[0])
    assert (answer.json()["tstitch"]["model"], answer.json()["tstitch"]["labels"]) == ("world", [])


def test_an_edit_goes_through_the_encoder(world: tuple[httpx.Client, Runtime]) -> None:
    client, alone = world
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    fields = {name: str(value) for name, value in ASKED.items()}
    answer = client.post("/v1/images/edits", files={"image": ("a", picture_file(picture))},
                         data={"prompt": "a fox", "strength": "0.7", **fields})  # fmt: skip
    expected = alone.sample(prompt="a fox", image=picture, strength=0.7, **ASKED)
    np.testing.assert_array_equal(first(answer), expected.images[0])


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": "a fox", "class_labels": 1}, "class_labels", "invalid_value"),
        ({"prompt": "a fox", "size": "64x9999"}, "size", "invalid_value"),
        ({"model": "tiny", "prompt": "a fox"}, "class_labels", "invalid_value"),
    ],
)
def test_what_the_model_does_not_take(
    world: tuple[httpx.Client, Runtime], body: dict[str, Any], param: str, code: str
) -> None:
    answer = world[0].post(GENERATIONS, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_both_models(world: tuple[httpx.Client, Runtime]) -> None:
    client, _ = world
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["world", "tiny"]
    kinds = {name: client.get(f"/v1/models/{name}").json()["kind"] for name in ("world", "tiny")}
    assert kinds == {"world": "text", "tiny": "class"}
    answer = client.post(GENERATIONS, json={"model": "tiny", "prompt": "1", "steps": 2})
    assert (answer.status_code, answer.json()["tstitch"]["model"]) == (200, "tiny")
