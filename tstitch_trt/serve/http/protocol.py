"""Connections that end when their client stops reading or never asks for anything."""

from __future__ import annotations

import asyncio

from tstitch_engines.needs import require

__all__ = ["bounded_protocol"]


def bounded_protocol(*, stall_seconds: float = 30.0, request_seconds: float = 15.0) -> type[asyncio.Protocol]:
    """uvicorn's protocol (``uvicorn.Config(http=...)``) with an end to waiting.

    A connection is cut off when nothing could be sent on it for ``stall_seconds``: what is left of an answer is thrown
    away, and its request is told of a disconnect. So is one whose client has not sent the head of a request within
    ``request_seconds``, from its first byte on or since the connection was made. Raises ``Unavailable`` without
    uvicorn.
    """
    require("uvicorn", "the server", extra="serve")
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedProtocol(H11Protocol):
        _stalled: asyncio.TimerHandle | None = None
        _silent: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # so that any byte that waits is noticed
            self._silent = self.loop.call_later(request_seconds, transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self._end("_stalled")
            self._end("_silent")
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._end("_silent")
            elif self._silent is None and not self.transport.is_closing():
                self._silent = self.loop.call_later(request_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._stalled is None:
                self._stalled = self.loop.call_later(stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._end("_stalled")
            super().resume_writing()

        def _end(self, name: str) -> None:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

    return BoundedProtocol
