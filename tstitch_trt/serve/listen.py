"""A port, and uvicorn on it with bounds on what its clients may hold."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

from tstitch_engines.errors import BadInput, FailedWork, Unavailable
from tstitch_engines.needs import require

__all__ = ["address_of", "closing_idle", "is_address", "is_loopback", "listen", "serving"]

_IDLE_SECONDS: Final = 10
_BACKLOG: Final = 2048


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    return host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def address_of(host: str, port: int) -> str:
    """The URL at which this machine reaches what listens on ``host``."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - every address is said as this one
    name = f"[{reached}]" if ":" in reached else reached
    return f"http://{name}:{port}/"


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to ``port``, or for 0 to one that is free. Raises ``Unavailable`` and ``BadInput``."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise BadInput(f"--host {host!r} is no address: {error}", hint="--host 127.0.0.1") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise Unavailable(
            f"{host}:{port} can't be listened on: {error.strerror}", hint="choose another, or any: --port 0"
        ) from None
    return bound


@contextmanager
def serving(
    app: Any, listening: socket.socket, *, what: str, extra: str, most_connections: int, finish: float
) -> Iterator[threading.Thread]:
    """``app`` on the network while the block runs, in a thread of its own, which is given to it.

    ``what`` and ``extra``: who needs uvicorn, for the error where it is missing. At the end of the block, answers that
    are being written have ``finish`` seconds; connections are cut then.
    """
    uvicorn = require("uvicorn", what, extra=extra)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",  # the application logs what fails
        access_log=False,
        proxy_headers=False,
        server_header=False,
        http="h11",  # which bounds headers
        ws="none",
        backlog=_BACKLOG,
        limit_concurrency=most_connections,
        timeout_graceful_shutdown=max(1, round(finish)),
        timeout_notify=_IDLE_SECONDS,
    )
    server = uvicorn.Server(config)
    config.callback_notify = closing_idle(server.server_state.connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise FailedWork(f"{what} did not start", hint="run again with --traceback")
            time.sleep(0.01)
        yield thread
    finally:
        server.should_exit = True
        thread.join(finish + 1)


def closing_idle(connections: Collection[Any]) -> Callable[[], Awaitable[None]]:
    """Ends those of uvicorn's connections that wait for a request now, and did when it was called before: whoever opens
    many and sends nothing, or sends slowly, would leave none for others. Ends those too whose client has read nothing
    of what waits for it since then."""
    before: dict[Any, tuple[int, Any]] = {}  # connection -> bytes that wait for its client, and its last request

    async def close() -> None:
        nonlocal before
        held = {one: one.transport.get_write_buffer_size() for one in connections}
        now = {one: (size, one.cycle) for one, size in held.items()
               if size or one.cycle is None or one.cycle.response_complete}  # fmt: skip
        for one, (size, cycle) in now.items():
            known = before.get(one)
            if known is None or cycle is not known[1] or size < known[0]:
                continue
            if size and size == known[0]:
                one.transport.abort()
            elif not size:
                one.transport.close()
        before = now

    return close
