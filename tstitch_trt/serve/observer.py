"""What an engine tells of its work, for metrics, logs and traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tstitch_trt.serve.handle import Handle

__all__ = ["EngineState", "ModelState", "Observer", "Stage", "TickInfo"]

Stage = Literal["queue", "encode", "denoise", "decode"]


@dataclass(frozen=True)
class TickInfo:
    """One batch: ``lanes`` lanes, ``bucket`` with the spare ones. ``seconds``: of the step. ``overhead``: seconds that
    the engine spent on it besides, choosing, writing lanes and reading them."""

    model: str
    member: str
    guided: bool
    size: tuple[int, int]
    lanes: int
    bucket: int
    seconds: float
    overhead: float


@dataclass(frozen=True)
class ModelState:
    """``lanes`` of ``max_lanes`` run, those of each member by their next step. ``waiting_images`` have no lane yet and
    ``waiting_bytes`` is what their requests hold. ``open``: requests that have not ended. ``backlog_seconds``: of
    device time, for all steps that are still to run."""

    lanes: int
    max_lanes: int
    waiting_images: int
    waiting_bytes: int
    lanes_by_member: Mapping[str, int]
    open: int
    backlog_seconds: float
    warm: bool


@dataclass(frozen=True)
class EngineState:
    """``ready``: requests are taken, and nothing is being warmed up. ``failed``: why no request is taken any more."""

    ready: bool
    draining: bool
    failed: str | None
    models: Mapping[str, ModelState]


class Observer:
    """Does nothing; what is of interest is overridden. Called on the engine's threads and on those that submit: be
    quick. What it raises is logged and dropped. Times are ``time.monotonic`` seconds."""

    def submitted(self, handle: Handle) -> None:
        """A request was accepted."""

    def rejected(self, why: Literal["queue", "bytes", "budget", "closed"], model: str) -> None:
        """A request was refused for the state that the engine is in."""

    def started(self, handle: Handle) -> None:
        """Its first image has a lane."""

    def ticked(self, tick: TickInfo) -> None:
        """A batch has run."""

    def stage(self, handle: Handle, name: Stage, began: float, ended: float) -> None:
        """A stage of a request has ended."""

    def finished(self, handle: Handle) -> None:
        """It is done, failed or cancelled."""
