"""One step of any member over the arena: everything a captured step touches is owned here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device import Buffer, Device
from tstitch_engines.errors import OutOfProfile
from tstitch_engines.manifest import Manifest
from tstitch_engines.slab import Slab
from tstitch_engines.spec import Range, ShapeProfile, TensorSpec, storage_dtype
from tstitch_trt.graphs import GraphMode, GraphState, Kind, StepGraphs
from tstitch_trt.lanes import LaneArena

if TYPE_CHECKING:
    from tstitch_engines.backends.base import Engine

__all__ = ["Stepper", "io_slices"]


@dataclass(frozen=True)
class _Bound:
    """The buffers of one member at one batch: ``lanes`` images, both halves of each when ``guided``."""

    active: Buffer
    sample: Buffer
    timestep: Buffer
    model_output: Buffer
    all: Mapping[str, Buffer]


class Stepper:
    """Loaded engines, the arena and the engines' buffers. Batches, seeds and schedules are its caller's concern.

    All inputs and outputs of all engines are slices of one block, each sized for the largest batch; members with equal
    tensors share a slice, since only one member runs at a time. A smaller batch is the start of the slice, so every
    address is fixed. In the labels' slice the unguided batch is thereby the first half of the guided one.
    """

    def __init__(
        self, manifest: Manifest, device: Device, engines: Mapping[str, Engine], graph: GraphMode = "auto"
    ) -> None:
        self._manifest = manifest
        self._device = device
        self._engines = dict(engines)
        limits = [engine.profile.dims["B"] for engine in engines.values()]
        self.batch_limit = min(limit.max for limit in limits)
        self.batch_floor = max(limit.min for limit in limits)
        if self.batch_floor > self.batch_limit:
            raise OutOfProfile(
                f"the members' batch profiles {[str(limit) for limit in limits]} have no size in common",
                hint="build all members with one --batch MIN:OPT:MAX",
            )
        self._limits = ShapeProfile({"B": Range(self.batch_floor, self.batch_limit, self.batch_limit)})
        self._tuned = {limit.opt for limit in limits}
        latent = manifest.latent
        self.arena = LaneArena(
            device,
            slots=self.batch_limit,
            latent_shape=(latent.channels, latent.height, latent.width),
            table_rows=manifest.noise.steps,
        )
        # Where the arena is host memory a fault is seen at once; elsewhere reading it would wait for the device.
        self.host_fault: NDArray[np.int32] | None = getattr(self.arena.fault, "array", None)
        largest = {"B": self.batch_limit}
        specs = [spec for member in manifest.members.values() for spec in (*member.inputs, *member.outputs)]
        self._io = Slab(
            device, {"active": 4 * self.batch_limit, **{_slice(spec): spec.nbytes(largest) for spec in specs}}
        )
        self._device.upload(
            self._io.view("active", (self.batch_limit,), "int32"), np.arange(self.batch_limit, dtype=np.int32)
        )
        self._bound: dict[tuple[str, int, bool], _Bound] = {}
        self._holds: dict[str, _Bound] = {}  # what each engine was bound to last
        self._graphs = StepGraphs(device, self.arena, graph)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def memory(self) -> dict[str, int]:
        """Bytes by purpose. ``activations``: the scratch that the engines plan themselves, shared blocks once."""
        scratch: dict[int, int] = {}
        for engine in self._engines.values():
            scratch |= engine.scratch()
        return {"arena": self.arena.nbytes, "engine io": self._io.nbytes, "activations": sum(scratch.values())}

    def graph_state(self) -> GraphState:
        return self._graphs.state()

    def lanes_for(self, count: int, limit: int, *, guided: bool) -> int:
        """How many lanes run for ``count`` of at most ``limit``.

        Without graphs just those. With graphs one of a few sizes, so that graphs stay few: a power of two, what the
        engines are tuned for, or ``limit``. Nothing reads a spare lane.
        """
        if self._graphs.mode == "off":
            return count
        sizes = {limit, *(tuned // (2 if guided else 1) for tuned in self._tuned), *(1 << i for i in range(31))}
        return min(size for size in sizes if count <= size <= limit)

    # --- stepping

    def ready(self, kinds: Iterable[Kind]) -> None:
        """Records the steps of these kinds that were not recorded before, which overwrites lanes and labels."""
        for kind in kinds:
            if self._graphs.lacks(kind):

                def condition(labels: list[int], kind: Kind = kind) -> None:
                    self.condition([kind.member], labels, guided=kind.guided)

                classes = self._manifest.conditioning.classes
                self._graphs.record(kind, self._engines[kind.member], self._work(kind), condition, classes)

    def stepping(self, kind: Kind) -> Callable[[], None]:
        """What does one step of ``kind``, again and again until another kind of the same member is asked for.

        ``prepare -> engine -> advance`` for the first slots: no wait, allocation or copy.
        """
        graph = self._graphs.step(kind)
        return self._work(kind) if graph is None else graph.launch

    def segment(self, kind: Kind, steps: int) -> Callable[[], None] | None:
        """What does ``steps`` equal steps in one launch, if the graph mode is ``segment`` and it could be recorded."""
        graph = self._graphs.segment(kind, steps, lambda: self._work(kind))
        return None if graph is None else graph.launch

    def _work(self, kind: Kind) -> Callable[[], None]:
        bound = self.bind(kind.member, kind.lanes, kind.guided)
        prepare, advance = self.arena.kernels.prepare, self.arena.kernels.advance
        enqueue = self._engines[kind.member].enqueue
        active, sample, timestep, output = bound.active, bound.sample, bound.timestep, bound.model_output
        guided, rescale = kind.guided, kind.rescale

        def work() -> None:
            prepare(active, sample, timestep, guided=guided)
            enqueue()
            advance(active, output, guided=guided, rescale=rescale)

        return work

    def bind(self, name: str, lanes: int, guided: bool) -> _Bound:
        """Gives the engine its buffers for this batch."""
        bound = self._buffers(name, lanes, guided)
        if self._holds.get(name) is not bound:
            self._engines[name].bind(bound.all, batch=lanes * (2 if guided else 1))
            self._holds[name] = bound
        return bound

    def _buffers(self, name: str, lanes: int, guided: bool) -> _Bound:
        bound = self._bound.get((name, lanes, guided))
        if bound is None:
            member, sizes = self._manifest.members[name], {"B": lanes * (2 if guided else 1)}
            self._limits.check(sizes, what="engine")
            buffers = {
                spec.name: self._io.view(_slice(spec), spec.resolve(sizes), spec.dtype)
                for spec in (*member.inputs, *member.outputs)
            }
            active = self._io.view("active", (lanes,), "int32")
            bound = _Bound(active, buffers["sample"], buffers["timestep"], buffers["model_output"], buffers)
            self._bound[name, lanes, guided] = bound
        return bound

    def condition(self, names: Iterable[str], labels: Sequence[int], *, guided: bool) -> None:
        """Writes ``labels`` (one per lane) for these members, and the null class for the unconditional half."""
        values = list(labels)
        if guided:
            null = self._manifest.conditioning.null
            assert null is not None, "make_plan refuses guidance without a null class"
            values += [null] * len(labels)
        buffers = [self._buffers(name, len(labels), guided).all["labels"] for name in names]
        for buffer in {buffer.ptr: buffer for buffer in buffers}.values():
            self._device.upload(buffer, np.array(values, np.int64))

    def close(self) -> None:
        self._device.activate()
        self._device.synchronize()
        self._graphs.close()
        for engine in self._engines.values():
            engine.close()
        self._engines, self._bound, self._holds = {}, {}, {}

    # --- measurement: both overwrite what the buffers hold

    def time_engine(self, name: str, lanes: int, *, guided: bool, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of ``repeats`` bare engine calls, each waited for."""
        self.condition([name], [0] * lanes, guided=guided)
        self.bind(name, lanes, guided)
        engine = self._engines[name]
        for _ in range(warmup):
            engine.enqueue()
        self._device.synchronize()
        times = []
        for _ in range(repeats):
            start = perf_counter()
            engine.enqueue()
            self._device.synchronize()
            times.append(1e3 * (perf_counter() - start))
        return times

    def time_kernels(
        self, rows: NDArray[np.float32], lanes: int, *, guided: bool, repeats: int, warmup: int
    ) -> list[float]:
        """Milliseconds of ``repeats`` pairs of ``prepare`` and ``advance``, each waited for, over the table ``rows``.

        The buffers are those of the first member.
        """
        bound = self.bind(self.members[0], lanes, guided)
        output = bound.model_output
        self._device.upload(output, np.zeros(output.shape, storage_dtype(output.dtype)))
        self.arena.start(rows, [0] * lanes, step=0, scale=1.0, latents=None)
        kernels, times = self.arena.kernels, []
        for index in range(warmup + repeats):
            if index % len(rows) == 0:  # stay inside the table
                self._device.upload(self.arena.step, np.zeros(self.arena.slots, np.int32))
                self._device.synchronize()
            start = perf_counter()
            kernels.prepare(bound.active, bound.sample, bound.timestep, guided=guided)
            kernels.advance(bound.active, output, guided=guided, rescale=False)
            self._device.synchronize()
            if index >= warmup:
                times.append(1e3 * (perf_counter() - start))
        return times


def io_slices(manifest: Manifest, batch: int) -> dict[str, int]:
    """Bytes of every slice of the engines' inputs and outputs for batches of up to ``batch``."""
    specs = [spec for member in manifest.members.values() for spec in (*member.inputs, *member.outputs)]
    return {"active": 4 * batch, **{_slice(spec): spec.nbytes({"B": batch}) for spec in specs}}


def _slice(spec: TensorSpec) -> str:
    """Which slice a tensor lives in: tensors that differ in nothing but their member share one."""
    return f"{spec.name} {spec.dtype}{list(spec.shape[1:])}"
