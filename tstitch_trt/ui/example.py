"""The drawing that a page opens with: drawn when the server starts, and the same for everybody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from markupsafe import Markup

from tstitch_engines.errors import TStitchError

__all__ = ["Example", "Shown"]

Shown = tuple[Markup, Markup]
"""The line of progress, and the pictures."""

_log = logging.getLogger(__name__)

_PAUSED: Final = Markup("The example waits until nobody draws.")


class Example:
    """``draw``: draws it from the beginning. For the event loop of the server.

    It is drawn while nobody else draws, and begun again where it was stopped.
    """

    def __init__(self, draw: Callable[[], AsyncIterator[Shown]]) -> None:
        self.shown: Shown = (Markup(""), Markup(""))
        self.over = False
        self._draw = draw
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if not self.over and self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Lets a visitor's drawing go first."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])
            if self._task is task:  # cancelled before its first step, so that nothing in it ran
                self._task = None
            self.shown = (_PAUSED, self.shown[1])

    async def _run(self) -> None:
        try:
            async for shown in self._draw():
                self.shown = shown
            self.over = True
        except TStitchError as error:
            self.shown = (Markup("No example: {}").format(error.message), Markup(""))
            self.over = True
        except Exception:
            _log.exception("the example was not drawn")
            self.over = True
        finally:
            self._task = None
