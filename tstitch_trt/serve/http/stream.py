"""Waiting for a request of the engine while its client is there, and server-sent events about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from tstitch_trt.serve.http.errors import ClientGone

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from tstitch_trt.serve.handle import Handle

__all__ = ["event_bytes", "events_response", "while_connected"]

T = TypeVar("T")

_PING: Final = 15.0  # seconds without an event after which a comment keeps proxies from closing the connection
_HEADERS: Final = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))


def event_bytes(name: str, data: msgspec.Struct) -> bytes:
    """One event."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))


async def while_connected(work: Awaitable[T], handle: Handle, receive: Receive) -> T:
    """What ``work`` gives. Where the client goes before, ``handle`` is cancelled and ``ClientGone`` raised."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        if not working.done():
            handle.cancel("the client has closed its connection")
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def events_response(events: AsyncIterator[bytes], handle: Handle) -> Response:
    """An answer of events, which tell of failures themselves. ``handle`` is cancelled where the client goes before."""
    from starlette.responses import Response

    class Events(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def pass_on() -> None:
                await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                async for event in _with_pings(events):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b""})

            await while_connected(pass_on(), handle, receive)

    return Events()


async def _with_pings(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    coming: asyncio.Future[bytes] = asyncio.ensure_future(anext(events))
    try:
        while True:
            await asyncio.wait((coming,), timeout=_PING)
            if not coming.done():
                yield b": still drawing\n\n"
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = asyncio.ensure_future(anext(events))
            yield event
    finally:
        coming.cancel()
