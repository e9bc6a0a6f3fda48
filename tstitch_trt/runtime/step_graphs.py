"""Recorded steps: ``prepare + engine + advance`` of one ``StepKey`` as one launch, checked before it is trusted.

Which slots run, their rows, step index, guidance scale, seed and conditioning are read on the device, so a key's graph
serves any lanes, schedule, solver, step count, guidance and seed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.device.base import Device, Graph, NotCaptured
from tstitch_engines.device.step_row import FLAG_STORE, ROW, ROW_FIELDS
from tstitch_trt.runtime.arena import LaneArena
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey

__all__ = ["GRAPH_MODES", "GraphMode", "GraphState", "StepGraphs"]

GraphMode = Literal["auto", "step", "segment", "off"]
GRAPH_MODES: Final = ("auto", "step", "segment", "off")

_SEGMENTS: Final = 16  # graphs of whole segments kept; each costs memory by its length
# Relative L2: far above what half precision may differ by from run to run, far below wrong data.
_TOLERANCE: Final = 1e-2

_logger = logging.getLogger(__name__)


class GraphState(msgspec.Struct, frozen=True, kw_only=True):
    """``mode`` in use and why; how many keys of steps were ``recorded``, and what could not be, with why.

    ``call_by_call``: keys that run so and, in the mode ``segment``, segments whose steps run one by one.
    """

    mode: Literal["step", "segment", "off"]
    reason: str
    recorded: int
    call_by_call: dict[str, str]

    def __str__(self) -> str:
        counted = f"; {self.recorded} kinds of step recorded" if self.mode != "off" else ""
        plain = "".join(f"; {key}: {why}" for key, why in self.call_by_call.items())
        return f"{self.mode} ({self.reason}){counted}{plain}"


class StepGraphs:
    """Graphs by key. A key that could not be recorded is remembered with the reason, and said once in the log."""

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
        self._uploads: set[StepKey] = set()  # whose engines all keep what they upload
        self._segments: OrderedDict[tuple[StepKey, int], Graph] = OrderedDict()
        self._refused: set[tuple[StepKey, int]] = set()  # segments that can't be recorded

    def state(self) -> GraphState:
        recorded = sum(graph is not None for graph in self._steps.copy().values())
        return GraphState(mode=self.mode, reason=self._reason, recorded=recorded, call_by_call=self._plain.copy())

    def step(self, key: StepKey) -> Graph | None:
        """The graph of one step, or ``None`` when the step runs call by call."""
        return self._steps.get(key)

    def lacks(self, key: StepKey) -> bool:
        """Whether ``record`` was not called for this key yet and there is reason to."""
        return self.mode != "off" and key not in self._steps

    def segment(self, key: StepKey, steps: int, make: Callable[[], Callable[[], None]]) -> Graph | None:
        """A graph of ``steps`` equal steps, recorded when it is first asked for; ``None`` where there is no such.

        ``make`` binds the engine and gives what does one step.
        """
        if self.mode != "segment" or self._steps.get(key) is None or (key, steps) in self._refused:
            return None
        graph = self._segments.get((key, steps))
        if graph is None:
            run = make()

            def all_steps() -> None:
                for _ in range(steps):
                    run()

            what = f"{steps} steps of {key} in one"
            try:
                graph = self._device.capture(all_steps, uploads=key in self._uploads)
            except NotCaptured as error:
                self._refused.add((key, steps))
                self._say(what, "run one by one", error.message)
                return None
            self._segments[key, steps] = graph
            self._plain.pop(what, None)
            if len(self._segments) > _SEGMENTS:
                self._segments.popitem(last=False)[1].close()
        self._segments.move_to_end((key, steps))
        return graph

    def record(
        self, key: StepKey, engines: Sequence[Engine], run: Callable[[], None], condition: Callable[[int], None]
    ) -> None:
        """Records ``run`` (one step of ``key``), which the key ``lacks``. Waits; overwrites arena and conditioning.

        ``engines``: those that ``run`` enqueues. ``condition`` writes made-up conditioning, other one for each number.
        Of any error but a refusal nothing stays, and the key is recorded when it is next asked for.
        """
        graph: Graph | None = None
        try:
            self._rehearse(key, 0, 0)
            condition(0)
            for _ in range(max(engine.warmups for engine in engines)):
                run()
            self._device.synchronize()
            for engine in engines:
                if obstacle := engine.obstacle:  # known once it has run
                    raise NotCaptured(
                        f"its engine can't be recorded: {obstacle}", hint="nothing to do: the result is the same"
                    )
            if all(engine.keeps_uploads for engine in engines):
                self._uploads.add(key)
            graph = self._device.capture(run, uploads=key in self._uploads)
            states = []
            for step in (graph.launch, run):  # in this order: a replay that does nothing must not find the right output
                self._rehearse(key, 7919, 2)
                condition(1)
                step()
                states.append(self._device.download(self._arena.lanes(0, key.lanes, key.size)))
            if not _equal(states[1], states[0]):
                raise NotCaptured("a replay on other data differed from a plain run", hint="nothing to do")
        except BaseException as error:
            if graph is not None:
                graph.close()
            if not isinstance(error, NotCaptured):
                raise
            self._steps[key] = None
            self._say(str(key), "runs call by call", error.message)
            return
        self._steps[key] = graph
        self._plain.pop(str(key), None)

    def drop(self, keys: Collection[StepKey]) -> None:
        """Closes what was recorded of these keys: they are recorded again when they come back. Waits."""
        if not keys:
            return
        self._device.synchronize()
        for segment in [segment for segment in self._segments if segment[0] in keys]:
            self._segments.pop(segment).close()
        self._refused = {segment for segment in self._refused if segment[0] not in keys}
        self._uploads.difference_update(keys)
        for key in keys:
            graph = self._steps.pop(key, None)
            if graph is not None:
                graph.close()

    def _say(self, what: str, how: str, why: str) -> None:
        if self._plain.get(what) != why:  # it may have made room for others and come back
            _logger.warning("%s %s: %s", what, how, why)
        self._plain[what] = why

    def _rehearse(self, key: StepKey, seed: int, step: int) -> None:
        """Lanes in the middle of a made-up trajectory, so that nothing of a request is touched by trying."""
        rows = _rows(min(8, self._arena.table_rows), self._arena.latent_shape[0], self._arena.table_rows)
        start, keys = min(step, len(rows) - 1), (key,) * len(rows)
        self._arena.write(0, [LaneProgram(rows, seed + i, start, keys) for i in range(key.lanes)])

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
