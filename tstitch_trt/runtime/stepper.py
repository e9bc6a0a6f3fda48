"""One step of any member over the arena: everything a captured step touches is owned here."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Device
from tstitch_trt.request.batching import Splitting
from tstitch_trt.request.conditioning import Conditioning, stand_in
from tstitch_trt.request.controlnet import CONTROLNET
from tstitch_trt.request.limits import Limits, Sizes, network_sizes
from tstitch_trt.runtime.arena import LaneArena
from tstitch_trt.runtime.io_buffers import Bindings, IoBuffers
from tstitch_trt.runtime.step_graphs import GraphMode, GraphState, StepGraphs, StepKey

if TYPE_CHECKING:
    from tstitch_engines.backends.base import Engine

__all__ = ["KINDS", "Stepper"]

KINDS: Final = 32  # of step that are kept: each has a graph, and engines a context for its size

_log = logging.getLogger(__name__)


class Stepper:
    """Loaded engines, the arena and the engines' buffers. Batches, seeds and schedules are its caller's concern.

    ``engines``: of all members, and that of the part ``controlnet`` where the bundle has one. A controlled step runs it
    between ``prepare`` and the member, on the same sample and timestep; what it gives is the member's input.
    """

    def __init__(
        self, manifest: Manifest, device: Device, engines: Mapping[str, Engine], graph: GraphMode = "auto"
    ) -> None:
        self.manifest = manifest
        self._device = device
        self._engines = dict(engines)
        self.members = tuple(name for name in engines if name in manifest.members)
        self.limits = Limits.of(manifest, {name: engine.profile for name, engine in engines.items()})
        self.batch_floor, self.batch_limit = self.limits.batch.min, self.limits.batch.max
        self.arena = LaneArena(
            device,
            slots=self.batch_limit,
            latent_shape=(manifest.latent.channels, *self.limits.largest),
            table_rows=manifest.noise.steps,
        )
        # Where the arena is host memory a fault is seen at once; elsewhere reading it would wait for the device.
        self.host_fault: NDArray[np.int32] | None = getattr(self.arena.fault, "array", None)
        self._io = IoBuffers(manifest, device, self.limits)
        self._holds: dict[str, Bindings] = {}  # what each engine was bound to last
        self._graphs = StepGraphs(device, self.arena, graph)
        self._recent: OrderedDict[StepKey, None] = OrderedDict()  # the kinds that are set up, the oldest first
        self._said = False
        self.shape(*self.limits.native_or_largest())

    def memory(self) -> dict[str, int]:
        """Bytes by purpose."""
        return {"arena": self.arena.nbytes, "engine io": self._io.nbytes}

    def graph_state(self) -> GraphState:
        return self._graphs.state()

    def forget(self, network: str) -> None:
        """Records the steps that run ``network`` again, when they next come: its engine was changed."""
        self._graphs.drop([kind for kind in self._recent if network in _networks(kind)])

    @property
    def splitting(self) -> Splitting:
        """How images become chunks and lanes."""
        return Splitting(
            floor=self.batch_floor,
            limit=self.batch_limit,
            tuned=tuple(sorted({self._engines[name].profile.dims["B"].opt for name in self.members})),
            rounded=self._graphs.mode != "off",
        )

    # --- sizes

    def shape(self, height: int, width: int) -> None:
        """Makes all lanes latents of this size, which ``limits`` allows."""
        self.arena.shape((self.manifest.latent.channels, height, width))

    def sizes(self, name: str, tokens: int = 0) -> Sizes:
        """Those of a network's dynamic dimensions with the present latents and ``tokens``. Raises ``OutOfProfile``."""
        _, height, width = self.arena.latent_shape
        return network_sizes(name, self._engines[name].profile, height, width, tokens)

    def kind(
        self,
        member: str,
        lanes: int,
        conditioning: Conditioning,
        *,
        guided: bool,
        rescale: bool,
        control: bool = False,
        blend: bool = False,
    ) -> StepKey:
        """The kind of step that runs ``member`` under ``conditioning`` on latents of the present size.

        ``control``: beside a ControlNet, if the member takes one. ``blend``: a known picture is kept outside a mask.
        """
        controlled = control and self.manifest.members[member].controlled
        return StepKey(
            member,
            lanes,
            guided,
            rescale,
            self.sizes(member, conditioning.tokens(member)),
            self.sizes(CONTROLNET, conditioning.tokens(CONTROLNET)) if controlled else None,
            blend,
        )

    # --- stepping

    def ready(self, kinds: Iterable[StepKey]) -> None:
        """Records the steps of these kinds that were not recorded before, which overwrites lanes and conditioning.

        Of all kinds the last ``KINDS`` are kept. One that was longest not asked for makes room: its graphs and what
        its engines hold for its size (TensorRT: an execution context) are let go of, and made again if it comes back.
        """
        kinds = list(kinds)
        for kind in kinds:
            self._recent[kind] = None
            self._recent.move_to_end(kind)
        self._make_room(max(KINDS, len(kinds)))
        for kind in kinds:
            if self._graphs.lacks(kind):
                engines = [self._engines[name] for name in _networks(kind)]

                def condition(variant: int, kind: StepKey = kind) -> None:
                    self.stand_in(kind, variant)

                self._graphs.record(kind, engines, self._work(kind), condition)

    def _make_room(self, most: int) -> None:
        gone = [self._recent.popitem(last=False)[0] for _ in range(len(self._recent) - most)]
        if not gone:
            return
        if self._device.graphs and not self._said:  # on the host nothing is set up that takes long
            self._said = True
            _log.warning("more than %d kinds of step (member, lanes, size...): the oldest are set up again", most)
        self._device.synchronize()
        self._graphs.drop(gone)
        used = {key for kind in self._recent for key in _bindings(kind)}
        for name, lanes, guided, sizes in {key for kind in gone for key in _bindings(kind)} - used:
            bound = self._io.bound(name, lanes, guided, sizes)
            dims = {**dict(sizes), "B": lanes * (2 if guided else 1)}
            self._engines[name].release(bound.all, sizes=dims)
            self._io.forget(name, lanes, guided, sizes)
            if self._holds.get(name) is bound:
                del self._holds[name]

    def stepping(self, kind: StepKey) -> Callable[[], None]:
        """What does one step of ``kind``, again and again until another kind of the same member is asked for.

        ``prepare -> engine -> advance`` for the first slots: no wait, allocation or copy.
        """
        graph = self._graphs.step(kind)
        return self._work(kind) if graph is None else graph.launch

    def segment(self, kind: StepKey, steps: int) -> Callable[[], None] | None:
        """What does ``steps`` equal steps in one launch, if the graph mode is ``segment`` and it could be recorded."""
        graph = self._graphs.segment(kind, steps, lambda: self._work(kind))
        return None if graph is None else graph.launch

    def _work(self, kind: StepKey) -> Callable[[], None]:
        bound = self.bind(kind.member, kind.lanes, kind.guided, kind.sizes)
        kernels = self.arena.blending if kind.blend else self.arena.kernels
        prepare, advance = kernels.prepare, kernels.advance
        enqueue = self._engines[kind.member].enqueue
        active, sample, timestep, output = bound.active, bound.sample, bound.timestep, bound.model_output
        assert output is not None, "members have a model_output"
        guided, rescale = kind.guided, kind.rescale

        def work() -> None:
            prepare(active, sample, timestep, guided=guided)
            enqueue()
            advance(active, output, guided=guided, rescale=rescale)

        if kind.control is None:
            return work
        self.bind(CONTROLNET, kind.lanes, kind.guided, kind.control)
        control = self._engines[CONTROLNET].enqueue

        def controlled() -> None:
            prepare(active, sample, timestep, guided=guided)
            control()
            enqueue()
            advance(active, output, guided=guided, rescale=rescale)

        return controlled

    def bind(self, name: str, lanes: int, guided: bool, sizes: Sizes | None = None) -> Bindings:
        """Gives the engine its buffers for this batch; ``sizes`` are by default those of the present latents."""
        sizes = self.sizes(name) if sizes is None else sizes
        dims = {**dict(sizes), "B": lanes * (2 if guided else 1)}
        self.limits.check_batch(dims["B"])
        bound = self._io.bound(name, lanes, guided, sizes)
        if self._holds.get(name) is not bound:
            self._engines[name].bind(bound.all, batch=dims["B"], sizes=dict(sizes))
            self._holds[name] = bound
        return bound

    def condition(
        self, conditioning: Conditioning, kinds: Iterable[StepKey], *, start: int, stop: int, guided: bool
    ) -> None:
        """Writes what images ``start`` to ``stop`` of a request are given, for the networks that ``kinds`` run."""
        bound: dict[str, Bindings] = {}
        lanes = 0
        for kind in kinds:
            lanes = kind.lanes
            bound[kind.member] = self._io.bound(kind.member, lanes, guided, kind.sizes)
            if kind.control is None:
                if self.manifest.members[kind.member].controlled:
                    self._io.blank_residuals()
            else:
                bound[CONTROLNET] = self._io.bound(CONTROLNET, lanes, guided, kind.control)
                self._io.residuals_written()
        part = conditioning.part(start, stop, lanes, guided=guided)
        self._io.fill({name: part[name] for name in bound}, bound)

    def engine(self, name: str) -> Engine:
        return self._engines[name]

    def stand_in(self, kind: StepKey, variant: int) -> None:
        """Made-up conditioning for a kind."""
        for name, sizes in _networks(kind).items():
            bound = self._io.bound(name, kind.lanes, kind.guided, sizes)
            dims = {**dict(sizes), "B": kind.lanes * (2 if kind.guided else 1)}
            self._io.fill({name: stand_in(self.manifest, name, dims, variant)}, {name: bound})
        if kind.control is not None:
            self._io.residuals_written()
        elif self.manifest.members[kind.member].controlled:
            self._io.blank_residuals()

    def close(self) -> None:
        self._device.activate()
        self._device.synchronize()
        self._graphs.close()
        for engine in self._engines.values():
            engine.close()
        self._io.close()
        self._engines, self._holds = {}, {}


def _networks(kind: StepKey) -> dict[str, Sizes]:
    """What a step of ``kind`` runs, each with its sizes."""
    return {kind.member: kind.sizes, **({} if kind.control is None else {CONTROLNET: kind.control})}


def _bindings(kind: StepKey) -> list[tuple[str, int, bool, Sizes]]:
    """What its engines are bound to."""
    return [(name, kind.lanes, kind.guided, sizes) for name, sizes in _networks(kind).items()]
