"""A server over the tiny pair, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import tstitch_trt
from support.http_server import Noted, Server, running
from support.tiny import TinyPair
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.http.limits import HttpLimits, HttpSettings

LIMITS = HttpLimits(
    json_bytes=50_000, body_bytes=300_000, body_seconds=0.3, images=4, picture_pixels=10_000, pixels=4096, steps=1000
)


@pytest.fixture(scope="session")
def server(tiny_pair: TinyPair) -> Iterator[Server]:
    """Without keys. The model is ``tiny``; 8 images are drawn at once and 8 wait."""
    load: dict[str, Any] = {"threads": 1}
    noted = Noted()
    with (
        tstitch_trt.load(tiny_pair.bundle, **load) as alone,
        Engine({"tiny": tiny_pair.bundle}, load=load, max_queue=8, max_lanes=8, observer=noted) as engine,
    ):
        engine.warm_up()
        with running(engine, HttpSettings(limits=LIMITS)) as client:
            yield Server(("127.0.0.1", client.base_url.port or 0), engine, alone, noted.handles)


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, verify=False) as client:
        yield client
