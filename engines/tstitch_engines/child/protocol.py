"""What passes between a process and its child: frames of 8 bytes of length and a message in MessagePack.

The parent sends one ``Call`` after the other; the child answers each with any number of ``Phase``, ``Said`` and ``Lap``
and then one ``Done`` or ``Failure``.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HEADER",
    "LARGEST",
    "LARGEST_ANSWER",
    "LOGGERS",
    "Answer",
    "Array",
    "Call",
    "Channel",
    "Done",
    "Failure",
    "Lap",
    "Phase",
    "Said",
    "frame",
]

HEADER: Final = 8
LARGEST: Final = 4 << 30  # bytes of a message that the child takes
LARGEST_ANSWER: Final = 1 << 30  # and of one that the parent takes, which nothing else bounds
LOGGERS: Final = ("tstitch_engines", "tstitch_export", "tstitch_trt")  # whose records go to the parent


class Array(msgspec.Struct, frozen=True):
    """A numpy array on its way."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(values: NDArray[Any]) -> Array:
        return Array(values.dtype.str, values.shape, np.ascontiguousarray(values).tobytes())

    def numpy(self) -> NDArray[Any]:
        """Read-only."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)


class Call(msgspec.Struct, frozen=True, tag="call", kw_only=True):
    """``target``: ``module:function``. ``request``: its argument in MessagePack. The child takes over the rest."""

    target: str
    request: bytes
    environment: dict[str, str]
    folder: str
    level: int


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """``share`` of the whole work, in 0..1."""

    name: str
    share: float


class Said(msgspec.Struct, frozen=True, tag="said"):
    """A line for the log; ``level`` is one of ``logging``'s."""

    logger: str
    level: int
    text: str


class Lap(msgspec.Struct, frozen=True, tag="lap"):
    """The limit of time starts again: the next of several pieces of work begins."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """``value``: the result in MessagePack; ``peak_bytes``: the child's largest resident memory."""

    value: bytes
    peak_bytes: int


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """An error of our tree by the name of its class, or an ``OSError`` with its ``number`` and the file as ``hint``.

    ``kind`` is empty for any other.
    """

    kind: str
    message: str
    hint: str
    number: int = 0


Answer = Phase | Said | Lap | Done | Failure


def frame(message: msgspec.Struct) -> bytes:
    content = msgspec.msgpack.encode(message)
    return len(content).to_bytes(HEADER, "little") + content


class Channel:
    """The child's way to its parent, for any thread."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, message: Answer) -> None:
        with self._lock:
            self._stream.write(frame(message))
            self._stream.flush()

    def progress(self, name: str, share: float) -> None:
        """A ``Progress`` callback that calls the parent's."""
        self.send(Phase(name, share))

    def lap(self) -> None:
        self.send(Lap())

    def say(self, level: int, text: str, logger: str) -> None:
        self.send(Said(logger, level, text))


class Forward(logging.Handler):
    """Sends log records to the parent."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.say(record.levelno, record.getMessage(), record.name)
