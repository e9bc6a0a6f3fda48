"""What ``sample`` prints with ``--json`` and keeps in PNG files; ``_documents`` has those of all commands."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from tstitch_trt.runtime.chooser import ChosenSchedule
from tstitch_trt.runtime.result import FailedImage, SegmentTiming

__all__ = [
    "BulkOutput",
    "ChosenBudget",
    "DrawnImage",
    "DrawnRun",
    "DrawnSegment",
    "DrawnWith",
    "SampleOutput",
    "WrittenSchedule",
]


class DrawnSegment(msgspec.Struct, frozen=True, kw_only=True):
    """Steps ``start`` to ``stop`` - 1, from 0, on one member."""

    member: str
    start: int
    stop: int


class WrittenSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """``members``: the member of each step. ``rule``: how fractions became steps."""

    text: str
    rule: str
    members: list[str]
    segments: list[DrawnSegment]


class DrawnWith(msgspec.Struct, frozen=True, kw_only=True):
    """All that is needed to draw the images again.

    ``guided``: of each step. ``guidance``: the scales of each member. ``negative`` to ``prompt_embeds``: what was
    given, files by their names.
    """

    bundle: str
    device: str
    backend: str
    width: int
    height: int
    steps: int
    solver: str
    solver_options: dict[str, Any]
    guided: list[bool]
    guidance: dict[str, list[float]]
    schedule: WrittenSchedule
    negative: str | UnsetType = UNSET
    strength: float | UnsetType = UNSET
    control_scale: float | UnsetType = UNSET
    image: str | UnsetType = UNSET
    mask: str | UnsetType = UNSET
    control: str | UnsetType = UNSET
    prompt_embeds: str | UnsetType = UNSET
    loras: dict[str, str] | UnsetType = UNSET


class DrawnImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image: its seed, and its ``prompt``, or its ``label`` with the class's ``name``."""

    seed: int
    label: int | UnsetType = UNSET
    name: str | UnsetType | None = UNSET
    prompt: str | UnsetType = UNSET


class ChosenBudget(ChosenSchedule, frozen=True, kw_only=True):
    """What ``--budget-ms`` chose, and whether the run met it."""

    met: bool


class DrawnRun(DrawnWith, frozen=True, kw_only=True):
    """What is kept in PNG files. ``total_ms``: of the trajectories, without encoding and decoding."""

    timings: list[SegmentTiming]
    total_ms: float
    budget: ChosenBudget | UnsetType = UNSET
    failed: list[FailedImage] | UnsetType = UNSET


class SampleOutput(DrawnRun, frozen=True, kw_only=True):
    """``latents``: the file of ``--latents-out``."""

    images: list[DrawnImage]
    files: list[str]
    latents: str | None


class BulkOutput(msgspec.Struct, frozen=True, kw_only=True):
    """``before``: images of the run that earlier calls had drawn."""

    files: list[str]
    images: int
    before: int
    shards: int
    failed: list[FailedImage]
