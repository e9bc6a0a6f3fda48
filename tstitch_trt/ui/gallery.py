"""The pictures of one drawing as a table: a column for each fraction, a row for each seed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tstitch_trt.plots.templates import fill
from tstitch_trt.ui.draw import SMALLEST, kept
from tstitch_trt.ui.drawing import Column

__all__ = ["Gallery", "Predicted"]

_LONGEST_ALT: Final = 120  # characters of a prompt


@dataclass(frozen=True)
class Predicted:
    """``ms``: per image at each fraction, and of the last member ``alone``, by the calibration of ``date``."""

    ms: Sequence[float]
    alone: float
    date: str


@dataclass
class Gallery:
    """``asked``: the class or the prompt. ``members``: the first and the last. ``folder``: where pictures are kept.

    ``predicted``: of drawings without fraction 0, which the speed-up is measured against. ``note``: a sentence above.
    """

    columns: list[Column]
    seeds: Sequence[int]
    asked: str
    members: tuple[str, str]
    folder: Path
    predicted: Predicted | None = None
    note: str = ""
    _paths: dict[tuple[int, int], Path] = field(default_factory=dict)
    _small: bool = False

    async def put(self, place: int, column: Column, pictures: Mapping[int, NDArray[np.uint8]]) -> None:
        self.columns[place] = column
        for image, pixels in pictures.items():
            self._small = max(pixels.shape[:2]) < SMALLEST
            self._paths[place, image] = await asyncio.to_thread(kept, pixels, self.folder)

    def status(self) -> Markup:
        """The progress of the whole, and how to read the table once all is drawn."""
        steps, done = sum(c.steps for c in self.columns), sum(c.done for c in self.columns)
        at = next((column for column in self.columns if column.ms is None), None)
        return fill("ui/status.html", done=done, steps=steps, column=at, first=self.members[0], note=self.note)

    def html(self) -> Markup:
        urls = {place: f"/gradio_api/file={quote(str(path))}" for place, path in self._paths.items()}
        asked = self.asked if len(self.asked) <= _LONGEST_ALT else self.asked[: _LONGEST_ALT - 3] + "..."
        speeds = [self._speed_up(place) for place in range(len(self.columns))]
        return fill(
            "ui/gallery.html", columns=self.columns, speeds=speeds, seeds=self.seeds, urls=urls, asked=asked,
            first=self.members[0], last=self.members[1], small=self._small, notes=self._notes(speeds),
        )  # fmt: skip

    def _base(self) -> Column | None:
        """The last member alone."""
        return next((column for column in self.columns if column.fraction == 0), None)

    def _speed_up(self, place: int) -> str:
        """``1.57× as fast``, where it was measured or predicted."""
        column, base = self.columns[place], self._base()
        if column.ms is None or column is base:
            return ""
        if base is not None:
            measured = base.ms is not None and not base.shared and not column.shared
            return f"{base.ms / column.ms:.2f}× as fast" if measured and base.ms and column.ms else ""
        found = self.predicted
        return f"{found.alone / found.ms[place]:.2f}× as fast, predicted" if found and found.ms[place] else ""

    def _notes(self, speeds: Sequence[str]) -> list[str]:
        base, last = self._base(), self.members[1]
        if any(column.ms is None for column in self.columns):
            return []
        notes = ["Times: the steps of this run, each at the median of its kind, without text encoding and decoding."]
        if any(column.shared for column in self.columns):
            notes.append(
                "Another request was drawn at the same time and shared the device, so these times are too long."
            )
        if any(speeds) and base is not None:
            notes.append(f"The speed-up is against {last} alone (0%), measured in this drawing.")
        elif any(speeds) and self.predicted:
            notes.append(f"The speed-up against {last} alone is predicted by the calibration of {self.predicted.date}.")
        elif base is None:
            notes.append(f"Tick 0% to measure the speed-up against {last} alone.")
        return notes
