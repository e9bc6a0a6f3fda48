"""Recorded steps: ``prepare + engine + advance`` of one kind as one launch, checked before it is trusted.

A kind is a member at a number of lanes and a size, guided or not, rescaled or not, with control or without, blended
with a known picture or not. Rows, step index, guidance scale and seed of every lane are read on the device, so a kind's
graph serves any schedule, solver, step count, guidance and seed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.device.base import Device, Graph, NotCaptured
from tstitch_engines.device.step_row import FLAG_STORE, ROW, ROW_FIELDS
from tstitch_engines.errors import unknown_name
from tstitch_trt.request.limits import Sizes
from tstitch_trt.runtime.arena import LaneArena

__all__ = ["GRAPH_MODES", "GraphMode", "GraphState", "StepGraphs", "StepKey", "check_mode"]

GraphMode = Literal["auto", "step", "segment", "off"]
GRAPH_MODES: Final = ("auto", "step", "segment", "off")

_SEGMENTS: Final = 16  # graphs of whole segments kept; each costs memory by its length
_TOLERANCE: Final = (
    1e-2  # relative L2: far above what half precision may differ by from run to run, far below wrong data
)

_logger = logging.getLogger(__name__)


class StepKey(NamedTuple):
    """``sizes``: of the member's dynamic dimensions, empty where it has none. ``control``: the ControlNet's sizes.

    ``blend``: a known picture is kept outside a mask.
    """

    member: str
    lanes: int
    guided: bool
    rescale: bool
    sizes: Sizes = ()
    control: Sizes | None = None
    blend: bool = False

    def __str__(self) -> str:
        size = "".join(f", {name} {value}" for name, value in self.sizes)
        said = {"guided": self.guided, "controlled": self.control is not None, "blended": self.blend}
        more = "".join(f", {word}" for word, true in said.items() if true)
        return f"member {self.member!r}, {self.lanes} lanes{size}{more}"


def check_mode(mode: str) -> None:
    if mode not in GRAPH_MODES:
        raise unknown_name("graph mode", mode, GRAPH_MODES)


class GraphState(msgspec.Struct, frozen=True, kw_only=True):
    """``mode`` in use and why; how many kinds of step were ``recorded``, and those that run call by call, with why."""

    mode: Literal["step", "segment", "off"]
    reason: str
    recorded: int
    call_by_call: dict[str, str]

    def __str__(self) -> str:
        counted = f"; {self.recorded} kinds of step recorded" if self.mode != "off" else ""
        return f"{self.mode} ({self.reason}){counted}" + "".join(
            f"; {k}: {why}" for k, why in self.call_by_call.items()
        )


class StepGraphs:
    """Graphs by kind. A kind that could not be recorded is remembered with the reason, and said once in the log."""

    def __init__(self, device: Device, arena: LaneArena, mode: GraphMode) -> None:
        self._device = device
        self._arena = arena
        self.mode: Literal["step", "segment", "off"] = "off"
        if not device.graphs:
            self._reason = f"the device {device.name} has no graphs"
        elif mode == "auto":
            self.mode, self._reason = "step", "the default where the device has graphs"
        else:
            self.mode, self._reason = mode, "as asked for"
        self._plain: dict[str, str] = {}
        self._steps: dict[StepKey, Graph | None] = {}
        self._segments: OrderedDict[tuple[StepKey, int], Graph] = OrderedDict()

    def state(self) -> GraphState:
        recorded = sum(graph is not None for graph in self._steps.values())
        return GraphState(mode=self.mode, reason=self._reason, recorded=recorded, call_by_call=dict(self._plain))

    def step(self, kind: StepKey) -> Graph | None:
        """The graph of one step, or ``None`` when the step runs call by call."""
        return self._steps.get(kind)

    def lacks(self, kind: StepKey) -> bool:
        """Whether ``record`` was not called for this kind yet and there is reason to."""
        return self.mode != "off" and kind not in self._steps

    def segment(self, kind: StepKey, steps: int, make: Callable[[], Callable[[], None]]) -> Graph | None:
        """A graph of ``steps`` equal steps, recorded when it is first asked for; ``None`` where there is no such.

        ``make`` binds the engine and gives what does one step.
        """
        if self.mode != "segment" or self._steps.get(kind) is None:
            return None
        graph = self._segments.get((kind, steps))
        if graph is None:
            run = make()

            def all_steps() -> None:
                for _ in range(steps):
                    run()

            try:
                graph = self._device.capture(all_steps)
            except NotCaptured as error:
                _logger.warning("%d steps of %s run one by one: %s", steps, kind, error.message)
                return None
            self._segments[kind, steps] = graph
            if len(self._segments) > _SEGMENTS:
                self._device.synchronize()
                self._segments.popitem(last=False)[1].close()
        self._segments.move_to_end((kind, steps))
        return graph

    def record(
        self, kind: StepKey, engines: Sequence[Engine], run: Callable[[], None], condition: Callable[[int], None]
    ) -> None:
        """Records ``run`` (one step of ``kind``), which the kind ``lacks``. Waits; overwrites arena and conditioning.

        ``engines``: those that ``run`` enqueues. ``condition`` writes made-up conditioning, other one for each number.
        """
        self._steps[kind] = None
        lanes = range(kind.lanes)
        try:
            self._rehearse(list(lanes), 0)
            condition(0)
            for _ in range(max(engine.warmups for engine in engines)):
                run()
            self._device.synchronize()
            for engine in engines:
                if not engine.capturable:  # known once it is bound
                    reason = f": {engine.obstacle}" if engine.obstacle else ""
                    raise NotCaptured(
                        f"its engine can't be recorded{reason}", hint="nothing to do: the result is the same"
                    )
            graph = self._device.capture(run)
            states = []
            for step in (graph.launch, run):  # in this order: a replay that does nothing must not find the right output
                self._rehearse([7919 + i for i in lanes], 2)
                condition(1)
                step()
                states.append(self._device.download(self._arena.latents)[: kind.lanes])
        except NotCaptured as error:
            self._call_by_call(kind, error.message)
            return
        if not _equal(states[1], states[0]):
            graph.close()
            self._call_by_call(kind, "a replay on other data differed from a plain run")
            return
        self._steps[kind] = graph

    def drop(self, kinds: Collection[StepKey]) -> None:
        """Closes what was recorded of these kinds: they are recorded again when they come back. Waits."""
        if not kinds:
            return
        self._device.synchronize()
        for key in [key for key in self._segments if key[0] in kinds]:
            self._segments.pop(key).close()
        for kind in kinds:
            graph = self._steps.pop(kind, None)
            if graph is not None:
                graph.close()

    def _call_by_call(self, kind: StepKey, why: str) -> None:
        if self._plain.get(str(kind)) != why:  # it may have made room for others and come back
            _logger.warning("%s runs call by call: %s", kind, why)
        self._plain[str(kind)] = why

    def _rehearse(self, seeds: list[int], step: int) -> None:
        """Lanes in the middle of a made-up trajectory, so that nothing of a request is touched by trying."""
        rows = _rows(min(8, self._arena.table_rows), self._arena.latent_shape[0], self._arena.table_rows)
        self._arena.start(rows, seeds, step=min(step, len(rows) - 1), scale=1.0, latents=None)

    def close(self) -> None:
        for graph in (*self._segments.values(), *self._steps.values()):
            if graph is not None:
                graph.close()
        self._steps.clear()
        self._segments.clear()


def _rows(count: int, channels: int, train_steps: int) -> NDArray[np.float32]:
    """Rows in which every term counts."""
    rows = np.zeros((count, len(ROW_FIELDS)), np.float32)
    for name, value in {
        "C_IN": 1, "P": 0.5, "Q": -0.5, "A": 0.5, "B": 0.5, "S": 0.1, "G": 2, "RESCALE": 0.5,
        "GUIDED_CHANNELS": channels, "FLAGS": FLAG_STORE,
    }.items():  # fmt: skip
        rows[:, ROW[name]] = value
    rows[:, ROW["T"]] = np.rint(np.linspace(train_steps - 1, 0, count))
    return rows


def _equal(want: NDArray[np.float32], got: NDArray[np.float32]) -> bool:
    if np.array_equal(want, got, equal_nan=True):
        return True
    return bool(np.linalg.norm(want - got) <= _TOLERANCE * np.linalg.norm(want))
