"""Who listens where, and which connections are kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.serve.listen import address_of, closing_idle, is_loopback, listen

uvicorn = pytest.importorskip("uvicorn")


def test_what_is_reached_by_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "gpu.lan", "")))  # noqa: S104


def test_the_address_is_one_that_this_machine_reaches() -> None:
    assert address_of("0.0.0.0", 80) == "http://127.0.0.1:80/"  # noqa: S104
    assert address_of("::", 80) == "http://[::1]:80/"
    assert address_of("gpu.lan", 80) == "http://gpu.lan:80/"


def test_a_port_that_is_taken_and_a_host_that_is_none() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(Unavailable, match="can't be listened on"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(BadInput, match="no address"):
        listen("no such host", 0)


def serve(app: Any, client: Callable[[tuple[str, int]], Awaitable[Any]]) -> Any:
    """What ``client`` returns, of a server that looks at its connections ten times a second."""

    async def run() -> Any:
        config = uvicorn.Config(app, http="h11", log_config=None, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        close = closing_idle(server.server_state.connections)
        listening = socket.create_server(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[listening]))

        async def look() -> None:
            while True:
                await asyncio.sleep(0.1)
                await close()

        looking = asyncio.create_task(look())
        try:
            return await asyncio.wait_for(client(listening.getsockname()), 30)
        finally:
            looking.cancel()
            server.should_exit = True
            await task

    return asyncio.run(run())


def test_connections_that_send_nothing_are_closed() -> None:
    async def client(address: tuple[str, int]) -> list[bytes]:
        opened = [await asyncio.open_connection(*address) for _ in range(3)]
        opened[1][1].write(b"GET / HTTP/1.1\r\nHost: x")  # and no more
        found = [await reader.read() for reader, _ in opened]
        for _, writer in opened:
            writer.close()
            await writer.wait_closed()
        return found

    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    assert serve(never, client) == [b""] * 3


def test_a_client_that_reads_nothing_of_its_answer_is_cut_off() -> None:
    ended: list[str] = []

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        ended.append((await receive())["type"])

    async def client(address: tuple[str, int]) -> list[str]:
        with socket.create_connection(address) as unread:
            unread.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while not ended:
                await asyncio.sleep(0.05)
        return ended

    assert serve(large, client) == ["http.disconnect"]


@dataclass(eq=False)
class Connection:
    """``waiting``: bytes for its client, at each look. What becomes of it is in ``end``."""

    waiting: list[int]
    end: str = ""
    cycle: Any = None

    @property
    def transport(self) -> Connection:
        return self

    def get_write_buffer_size(self) -> int:
        return self.waiting.pop(0)

    def abort(self) -> None:
        self.end = "cut off"

    def close(self) -> None:
        self.end = "closed"


def test_a_client_that_reads_slowly_keeps_its_connection() -> None:
    slow, stuck, idle = Connection([900, 600, 300, 0]), Connection([900, 900, 900, 900]), Connection([0, 0, 0, 0])
    close = closing_idle([slow, stuck, idle])
    for _ in range(4):
        asyncio.run(close())
    assert (slow.end, stuck.end, idle.end) == ("", "cut off", "closed")


def test_a_client_that_asks_again_and_again_keeps_its_connection() -> None:
    busy, done = Connection([0, 0, 0]), Connection([0, 0, 0], cycle=SimpleNamespace(response_complete=True))
    close = closing_idle([busy, done])
    for _ in range(3):
        busy.cycle = SimpleNamespace(response_complete=True)  # of another request, answered between two looks
        asyncio.run(close())
    assert (busy.end, done.end) == ("", "closed")
