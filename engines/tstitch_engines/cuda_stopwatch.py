"""Times between points of a CUDA stream, from its events."""

from __future__ import annotations

from typing import Any

__all__ = ["CudaStopwatch"]


class CudaStopwatch:
    """``Stopwatch`` on one stream."""

    def __init__(self, stream: Any) -> None:
        from cuda.core import EventOptions

        self._stream = stream
        self._options = EventOptions(timing_enabled=True)
        self._marks: list[Any] = []

    def mark(self) -> None:
        self._marks.append(self._stream.record(options=self._options))

    def milliseconds(self) -> list[float]:
        if self._marks:
            self._marks[-1].sync()
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]
