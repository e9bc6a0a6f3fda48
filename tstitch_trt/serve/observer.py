"""What an engine tells of its work, for metrics, logs and traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tstitch_trt.serve.handle import Handle

__all__ = ["EngineState", "ModelState", "Observer", "Observers", "Rejection", "Stage", "TickInfo"]

Rejection = Literal["queue", "bytes", "budget", "closed"]
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

    def rejected(self, why: Rejection, model: str) -> None:
        """A request was refused for the state that the engine is in."""

    def started(self, handle: Handle) -> None:
        """Its first image has a lane."""

    def ticked(self, tick: TickInfo) -> None:
        """A batch has run."""

    def stage(self, handle: Handle, name: Stage, began: float, ended: float) -> None:
        """A stage of a request has ended. It may be told of two queues: for its encoder, and for its first lane."""

    def phase(self, handle: Handle, member: str, began: float, ended: float) -> None:
        """A request's steps in a row on one member: from the first of its images until the last. Told when all its
        images have taken all steps. On a device that runs behind the host: of the host."""

    def finished(self, handle: Handle) -> None:
        """It is done, failed or cancelled."""


class Observers(Observer):
    """Tells each of several, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def submitted(self, handle: Handle) -> None:
        for each in self._observers:
            each.submitted(handle)

    def rejected(self, why: Rejection, model: str) -> None:
        for each in self._observers:
            each.rejected(why, model)

    def started(self, handle: Handle) -> None:
        for each in self._observers:
            each.started(handle)

    def ticked(self, tick: TickInfo) -> None:
        for each in self._observers:
            each.ticked(tick)

    def stage(self, handle: Handle, name: Stage, began: float, ended: float) -> None:
        for each in self._observers:
            each.stage(handle, name, began, ended)

    def phase(self, handle: Handle, member: str, began: float, ended: float) -> None:
        for each in self._observers:
            each.phase(handle, member, began, ended)

    def finished(self, handle: Handle) -> None:
        for each in self._observers:
            each.finished(handle)
