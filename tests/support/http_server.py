"""The HTTP server as tests run it, and requests as they go over the wire."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import tstitch_trt
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.http.app import create_app
from tstitch_trt.serve.http.limits import HttpSettings
from tstitch_trt.serve.listen import listen, serving
from tstitch_trt.serve.observer import Observer

__all__ = ["Noted", "Server", "eventually", "picture_file", "post", "running", "send"]


@dataclass
class Noted(Observer):
    """Keeps the handle of every request by its id."""

    handles: dict[str, Handle] = field(default_factory=dict)

    def submitted(self, handle: Handle) -> None:
        self.handles[handle.id] = handle


@dataclass(frozen=True)
class Server:
    """``alone``: a runtime of the same bundle. ``handles``: of all requests, by their ids."""

    address: tuple[str, int]
    engine: Engine
    alone: tstitch_trt.Runtime
    handles: dict[str, Handle]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"


@contextmanager
def running(engine: Engine, settings: HttpSettings) -> Iterator[httpx.Client]:
    """A client of a server of ``engine``."""
    app = create_app(engine, settings)
    with (
        listen("127.0.0.1", 0) as listening,
        serving(app, listening, what="the test", extra="serve", most_connections=64, finish=1.0),
        httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=30, verify=False) as client,
    ):
        yield client


def send(address: tuple[str, int], request: bytes) -> socket.socket:
    """A connection on which ``request`` was sent."""
    connection = socket.create_connection(address, timeout=20)
    connection.sendall(request)
    return connection


def post(body: bytes, *, path: str = "/v1/images/generations", **headers: str) -> bytes:
    """A request as it goes over the wire."""
    fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        threading.Event().wait(0.01)
    return found


def picture_file(array: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()
