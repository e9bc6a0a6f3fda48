"""One step of any member over the arena: everything a captured step would touch is owned here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device import Buffer, Device
from tstitch_engines.errors import OutOfProfile
from tstitch_engines.manifest import Manifest, Member
from tstitch_engines.spec import storage_dtype
from tstitch_trt.lanes import LaneArena

if TYPE_CHECKING:
    from tstitch_engines.backends.base import Engine

__all__ = ["Stepper"]


@dataclass(frozen=True)
class _Bound:
    """The buffers of one member at one batch: ``lanes`` images, both halves of each when ``guided``."""

    active: Buffer
    sample: Buffer
    timestep: Buffer
    model_output: Buffer
    all: Mapping[str, Buffer]


class Stepper:
    """Loaded engines, the arena and the engines' buffers. Batches, seeds and schedules are its caller's concern."""

    def __init__(self, manifest: Manifest, device: Device, engines: Mapping[str, Engine]) -> None:
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
        latent = manifest.latent
        self.arena = LaneArena(
            device,
            slots=self.batch_limit,
            latent_shape=(latent.channels, latent.height, latent.width),
            table_rows=manifest.noise.steps,
        )
        # Where the arena is host memory a fault is seen at once; elsewhere reading it would wait for the device.
        self.host_fault: NDArray[np.int32] | None = getattr(self.arena.fault, "array", None)
        self._buffers: dict[tuple[str, str, tuple[int, ...]], Buffer] = {}
        self._bound: dict[tuple[str, int, bool], _Bound] = {}
        self._holds: dict[str, _Bound] = {}  # what each engine was bound to last

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def io_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def step(self, name: str, lanes: int, *, guided: bool, rescale: bool) -> None:
        """``prepare -> engine -> advance`` for the first ``lanes`` slots. Once bound: no wait, allocation or copy."""
        bound = self.bind(name, lanes, guided)
        kernels = self.arena.kernels
        kernels.prepare(bound.active, bound.sample, bound.timestep, guided=guided)
        self._engines[name].enqueue()
        kernels.advance(bound.active, bound.model_output, guided=guided, rescale=rescale)

    def bind(self, name: str, lanes: int, guided: bool) -> _Bound:
        """Gives the engine its buffers for this batch, allocating them the first time."""
        bound = self._bound.get((name, lanes, guided))
        if bound is None:
            bound = self._bound[name, lanes, guided] = self._allocate(self._manifest.members[name], lanes, guided)
        if self._holds.get(name) is not bound:
            self._engines[name].bind(bound.all, batch=lanes * (2 if guided else 1))
            self._holds[name] = bound
        return bound

    def _allocate(self, member: Member, lanes: int, guided: bool) -> _Bound:
        sizes = {"B": lanes * (2 if guided else 1)}
        buffers = {
            spec.name: self._buffer(spec.name, spec.dtype, spec.resolve(sizes))
            for spec in (*member.inputs, *member.outputs)
        }
        known = ("active", "int32", (lanes,)) in self._buffers
        active = self._buffer("active", "int32", (lanes,))
        if not known:
            self._device.upload(active, np.arange(lanes, dtype=np.int32))
        return _Bound(active, buffers["sample"], buffers["timestep"], buffers["model_output"], buffers)

    def _buffer(self, name: str, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Members with equal tensors share them: only one member runs at a time."""
        key = (name, dtype, shape)
        if key not in self._buffers:
            self._buffers[key] = self._device.empty(shape, dtype)
        return self._buffers[key]

    def condition(self, name: str, lanes: int, guided: bool, labels: Sequence[int]) -> None:
        """Writes ``labels`` (one per lane), and the null class for the unconditional half."""
        values = list(labels)
        if guided:
            null = self._manifest.conditioning.null
            assert null is not None, "make_plan refuses guidance without a null class"
            values += [null] * lanes
        self._device.upload(self.bind(name, lanes, guided).all["labels"], np.array(values, np.int64))

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines, self._bound, self._holds, self._buffers = {}, {}, {}, {}

    # --- measurement: both overwrite what the buffers hold

    def time_engine(self, name: str, lanes: int, *, guided: bool, repeats: int, warmup: int) -> list[float]:
        """Milliseconds of ``repeats`` bare engine calls, each waited for."""
        self.condition(name, lanes, guided, [0] * lanes)
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
