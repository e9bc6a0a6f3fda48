"""A server over the tiny pair, shared by the tests of this folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

import tstitch_trt
from support.tiny import TinyPair
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.http.app import create_app
from tstitch_trt.serve.http.limits import HttpLimits, HttpSettings
from tstitch_trt.serve.listen import listen, serving

LIMITS = HttpLimits(
    json_bytes=100_000, body_bytes=300_000, body_seconds=0.5, images=4, picture_pixels=10_000, pixels=4096, steps=1000
)


@dataclass(frozen=True)
class Server:
    address: tuple[str, int]
    engine: Engine
    alone: tstitch_trt.Runtime

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"


@contextmanager
def running(engine: Engine, settings: HttpSettings) -> Iterator[tuple[str, int]]:
    """The address of a server of ``engine``."""
    app = create_app(engine, settings)
    with (
        listen("127.0.0.1", 0) as listening,
        serving(app, listening, what="the test", extra="serve", most_connections=64, finish=1.0),
    ):
        host, port = listening.getsockname()
        yield host, port


@pytest.fixture(scope="session")
def server(tiny_pair: TinyPair) -> Iterator[Server]:
    """Without keys. The model is ``tiny``."""
    load: dict[str, Any] = {"threads": 1}
    with (
        tstitch_trt.load(tiny_pair.bundle, **load) as alone,
        Engine({"tiny": tiny_pair.bundle}, load=load, max_queue=8) as engine,
    ):
        engine.warm_up()
        with running(engine, HttpSettings(limits=LIMITS)) as address:
            yield Server(address, engine, alone)


def raw(address: tuple[str, int], request: bytes) -> bytes:
    """What comes back on a connection of its own, until it is closed."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(request)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found
