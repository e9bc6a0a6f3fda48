"""One step of any member over the arena: everything a captured step touches is owned here."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.closing import do_all
from tstitch_engines.device.base import Device
from tstitch_engines.host_call import to_storage
from tstitch_engines.trace import span, traced
from tstitch_trt.request.batching import Splitting
from tstitch_trt.request.controlnet import CONTROLNET
from tstitch_trt.request.limits import Limits, Sizes, network_sizes
from tstitch_trt.request.synthetic import synthetic_conditioning
from tstitch_trt.runtime.arena import LaneArena
from tstitch_trt.runtime.io_buffers import Bindings, IoBuffers, conditioning_name, conditioning_rows
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey
from tstitch_trt.runtime.step_graphs import GraphMode, GraphState, StepGraphs

if TYPE_CHECKING:
    from tstitch_engines.backends.base import Engine

__all__ = ["STEP_KEYS", "Stepper"]

STEP_KEYS: Final = 32  # kinds of step that are kept: each has a graph, and engines a context for its size

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
        self.profiles = {name: engine.profile for name, engine in engines.items()}
        self.limits = Limits.of(manifest, self.profiles)
        self.batch_floor, self.batch_limit = self.limits.batch.min, self.limits.batch.max
        self._tuned = tuple(sorted({self.profiles[name].dims["B"].opt for name in self.members}))
        self.most_keys = STEP_KEYS
        self._graph = graph
        self._holds: dict[str, Bindings] = {}  # what each engine was bound to last
        self._recent: OrderedDict[StepKey, None] = OrderedDict()  # the keys that are set up, the oldest first
        self._said = False
        self._allocate(self.batch_limit)

    def _allocate(self, slots: int) -> None:
        manifest, device = self.manifest, self._device
        self.arena = LaneArena(
            device,
            slots=slots,
            latent_shape=(manifest.latent.channels, *self.limits.largest),
            table_rows=manifest.noise.steps,
            conditioning=conditioning_rows(manifest, self.limits),
        )
        # Where the arena is host memory a fault is seen at once; elsewhere reading it would wait for the device.
        self.host_fault: NDArray[np.int32] | None = getattr(self.arena.buffers.fault, "array", None)
        self._io = IoBuffers(manifest, device, self.limits, self.arena.conditioning)
        self._graphs = StepGraphs(device, self.arena, self._graph)

    def resize(self, slots: int) -> None:
        """A new arena, of ``slots`` lanes and no fewer than one batch has. What the lanes hold is lost. Waits."""
        slots = max(slots, self.batch_limit)
        if slots == self.arena.slots:
            return
        self._make_room(0)
        self._graphs.close()
        self._io.close()
        self.arena.close()
        self._holds.clear()
        self._allocate(slots)

    def memory(self) -> dict[str, int]:
        """Bytes by purpose."""
        return {"arena": self.arena.nbytes, "engine io": self._io.nbytes}

    def graph_state(self) -> GraphState:
        return self._graphs.state()

    def forget(self, network: str) -> None:
        """Records the steps that run ``network`` again, when they next come: its engine was changed."""
        self._graphs.drop([key for key in self._recent if network in key.networks])

    @property
    def splitting(self) -> Splitting:
        """How images become chunks and lanes."""
        return Splitting(
            floor=self.batch_floor,
            limit=self.batch_limit,
            tuned=self._tuned,
            rounded=self._graphs.mode != "off",
        )

    # --- keys

    def usual_key(self, member: str, lanes: int, *, guided: bool) -> StepKey:
        """A plain step of ``member`` on latents of the bundle's own size, with the text its engine is tuned for."""
        size, tokens = self.limits.native_or_largest(), self.limits.tokens.get(member)
        sizes = network_sizes(member, self.profiles[member], *size, 0 if tokens is None else tokens.opt)
        return StepKey(member, lanes, guided, False, size, sizes)

    def latent_shape(self, key: StepKey) -> tuple[int, int, int]:
        return (self.manifest.latent.channels, *key.size)

    # --- lanes

    def start(self, first: int, *programs: LaneProgram) -> None:
        """Writes lanes of one request into the slots from ``first`` on, while other slots may be in mid-flight."""
        self.arena.write(first, programs)
        one, written = programs[0], set()
        for network in dict.fromkeys(name for key in one.keys[one.start :] for name in key.networks):
            for spec in self.manifest.networks()[network].inputs:
                name = conditioning_name(network, spec)
                if spec.name not in one.conditioning.get(network, {}) or name in written:
                    continue
                written.add(name)
                for half in range(2 if one.guided else 1):
                    rows = np.stack([program.conditioning[network][spec.name][half] for program in programs])
                    self.arena.set_conditioning(name, first, half, to_storage(rows, spec.dtype))

    def activate(self, slots: Sequence[int], lanes: int) -> None:
        """Makes ``slots`` the ones that the next steps of ``lanes`` lanes run, until others are named."""
        self._io.activate(slots, lanes)

    def step(self, key: StepKey, slots: Sequence[int]) -> None:
        """One step of the lanes in ``slots``, whose programs have ``key`` next. All other slots stay as they are."""
        if key.lanes == 0:
            key = key._replace(lanes=self.splitting.lanes(len(slots), guided=(key.guided,)))
        self.ready([key], preserve=True)
        self.activate(slots, key.lanes)
        traced("step", self.stepping(key), member=key.member, lanes=key.lanes, guided=key.guided)()

    # --- stepping

    def ready(self, keys: Iterable[StepKey], *, preserve: bool = False) -> None:
        """Records the steps of these keys that were not recorded before, in the first slots.

        ``preserve``: what the lanes hold is put back afterwards; otherwise it is lost.

        Of all keys the last ``most_keys`` are kept. One that was longest not asked for makes room: its graphs and what
        its engines hold for its size (TensorRT: an execution context) are let go of, and made again if it comes back.
        """
        keys = list(keys)
        for key in keys:
            self._recent[key] = None
            self._recent.move_to_end(key)
        self._make_room(max(self.most_keys, len(keys)))
        for key in keys:
            if self._graphs.lacks(key):
                engines = [self._engines[name] for name in key.networks]

                def condition(variant: int, key: StepKey = key) -> None:
                    self.synthetic(key, variant)

                with span("record step", key=str(key)), self.arena.preserved() if preserve else nullcontext():
                    self._graphs.record(key, engines, self._work(key), condition)

    def _make_room(self, most: int) -> None:
        gone = [self._recent.popitem(last=False)[0] for _ in range(len(self._recent) - most)]
        if not gone:
            return
        if most and self._device.graphs and not self._said:  # on the host nothing is set up that takes long
            self._said = True
            _log.warning("more than %d kinds of step (member, lanes, size...): the oldest are set up again", most)
        self._device.synchronize()
        self._graphs.drop(gone)
        used = {binding for key in self._recent for binding in _bindings(key)}
        for name, lanes, guided, sizes in {binding for key in gone for binding in _bindings(key)} - used:
            bound = self._io.bound(name, lanes, guided, sizes)
            dims = {**dict(sizes), "B": lanes * (2 if guided else 1)}
            self._engines[name].release(bound.all, sizes=dims)
            self._io.forget(name, lanes, guided, sizes)
            if self._holds.get(name) is bound:
                del self._holds[name]

    def stepping(self, key: StepKey) -> Callable[[], None]:
        """What does one step of ``key``, again and again until another key of the same member is asked for.

        ``gather -> prepare -> engine -> advance`` for the active slots: no wait or allocation.
        """
        self._set_residuals(key)
        graph = self._graphs.step(key)
        return self._work(key) if graph is None else traced("graph replay", graph.launch)

    def recorded(self, key: StepKey) -> bool:
        """Whether steps of ``key``, which are ``ready``, are replayed from a graph."""
        return self._graphs.step(key) is not None

    def segment(self, key: StepKey, steps: int) -> Callable[[], None] | None:
        """What does ``steps`` equal steps in one launch, if the graph mode is ``segment`` and it could be recorded."""
        self._set_residuals(key)
        graph = self._graphs.segment(key, steps, lambda: self._work(key))
        return None if graph is None else traced("graph replay", graph.launch)

    def _work(self, key: StepKey) -> Callable[[], None]:
        bound = self.bind(key.member, key.lanes, key.guided, key.sizes)
        kernels = self.arena.kernels(self.latent_shape(key), inpaint=key.inpaint)
        prepare, advance = traced("prepare", kernels.prepare), traced("advance", kernels.advance)
        gather = traced("gather", self._device.gather_rows)
        active, sample, timestep, output = bound.active, bound.sample, bound.timestep, bound.model_output
        assert output is not None, "members have a model_output"
        guided, rescale = key.guided, key.rescale
        gathers, enqueues = bound.conditioning, [self._enqueue(key.member)]
        if key.control is not None:
            gathers += self.bind(CONTROLNET, key.lanes, key.guided, key.control).conditioning
            enqueues = [self._enqueue(CONTROLNET), *enqueues]

        def work() -> None:
            for source, target in gathers:
                gather(active, source, target)
            prepare(active, sample, timestep, guided=guided)
            for enqueue in enqueues:
                enqueue()
            advance(active, output, guided=guided, rescale=rescale)

        return work

    def _enqueue(self, network: str) -> Callable[[], None]:
        return traced("engine", self._engines[network].enqueue, network=network)

    def _set_residuals(self, key: StepKey) -> None:
        """Blank residuals for a member that takes control and runs without; such a step writes none itself."""
        if key.control is not None:
            self._io.residuals_written()
        elif self.manifest.members[key.member].controlled:
            self._io.blank_residuals()

    def bind(self, name: str, lanes: int, guided: bool, sizes: Sizes) -> Bindings:
        """Gives the engine its buffers for this batch and these sizes."""
        dims = {**dict(sizes), "B": lanes * (2 if guided else 1)}
        self.limits.check_batch(dims["B"])
        bound = self._io.bound(name, lanes, guided, sizes)
        if self._holds.get(name) is not bound:
            self._engines[name].bind(bound.all, batch=dims["B"], sizes=dict(sizes))
            self._holds[name] = bound
        return bound

    def engine(self, name: str) -> Engine:
        return self._engines[name]

    def synthetic(self, key: StepKey, variant: int) -> None:
        """Made-up conditioning in the first slots and the engines' inputs. Makes these slots the active ones."""
        self.activate(range(key.lanes), key.lanes)
        halves = 2 if key.guided else 1
        for network, sizes in key.networks.items():
            values = synthetic_conditioning(self.manifest, network, {**dict(sizes), "B": key.lanes * halves}, variant)
            bound = self._io.bound(network, key.lanes, key.guided, sizes)
            for spec in self.manifest.networks()[network].inputs:
                if spec.name in values:
                    rows = to_storage(values[spec.name], spec.dtype)
                    for half in range(halves):
                        part = rows[half * key.lanes : (half + 1) * key.lanes]
                        self.arena.set_conditioning(conditioning_name(network, spec), 0, half, part)
            for source, target in bound.conditioning:
                self._device.gather_rows(bound.active, source, target)
        self._set_residuals(key)

    def close(self) -> None:
        """Waits. Lets go of everything, whatever fails on the way, and then raises that."""
        engines, self._engines, self._holds = self._engines, {}, {}
        do_all(
            self._device.synchronize,
            self._graphs.close,
            *(engine.close for engine in engines.values()),
            self._io.close,
            self.arena.close,
        )


def _bindings(key: StepKey) -> list[tuple[str, int, bool, Sizes]]:
    """What its engines are bound to."""
    return [(name, key.lanes, key.guided, sizes) for name, sizes in key.networks.items()]
