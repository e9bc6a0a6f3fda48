"""A visitor of ``tstitch-trt ui`` who writes the requests of the page by hand."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

__all__ = ["DRAW", "OPEN", "PLOT", "Visitor", "raw"]

DRAW, PLOT, OPEN = 0, 5, 6  # Gradio numbers the page's events in the order they were made


class Visitor:
    """``session``: Gradio's name of the open page."""

    def __init__(self, address: str, session: str, *, steps: float = 2, count: float = 1) -> None:
        self.session = session
        self.client = httpx.Client(base_url=address, timeout=60)
        self.request: list[Any] = [0.4, [], count, steps, 0, 1.5, "ddim", 0]

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def join(self, data: Any = None, fn: Any = DRAW, **fields: Any) -> httpx.Response:
        body = {"data": self.request if data is None else data, "fn_index": fn, "session_hash": self.session, **fields}
        headers = {"content-type": "application/json"}
        return self.client.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the server says of this visitor's events. Leave the loop and close it to go away."""
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def pictures(self) -> list[str]:
        """The addresses of the pictures that the event which was joined last has drawn."""
        found = self.outcome()
        assert found["success"], found
        return re.findall(r'<img src="([^"]+)"', found["output"]["data"][1])

    def outcome(self) -> dict[str, Any]:
        """The end of the event that was joined last."""
        return next(message for message in self.messages() if message["msg"] == "process_completed")


def raw(address: str, request: bytes) -> bytes:
    """The answer to ``request`` as it stands, which a client's library could tidy up."""
    where = urlsplit(address)
    assert where.hostname is not None
    with socket.create_connection((where.hostname, where.port or 80), timeout=30) as sent:
        sent.sendall(request)
        sent.shutdown(socket.SHUT_WR)
        found = b""
        while chunk := sent.recv(1 << 16):
            found += chunk
    return found
