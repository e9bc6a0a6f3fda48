"""The inputs and outputs of all engines that a step runs, as slices of one block of device memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Buffer, Device
from tstitch_engines.device.slab import Slab
from tstitch_engines.spec import TensorSpec
from tstitch_trt.request.conditioning import conditioning_inputs, is_residual
from tstitch_trt.request.controlnet import CONTROLNET
from tstitch_trt.request.limits import Limits, Sizes

__all__ = ["Bindings", "IoBuffers", "conditioning_name", "conditioning_rows", "io_buffer_sizes"]


@dataclass(frozen=True)
class Bindings:
    """The buffers of one network at one batch and size: ``lanes`` images, both halves of each when guided."""

    active: Buffer
    sample: Buffer
    timestep: Buffer
    model_output: Buffer | None  # a ControlNet has residuals instead
    conditioning: tuple[tuple[Buffer, Buffer], ...]  # all lanes' rows in the arena, the engine's input
    all: Mapping[str, Buffer]


class IoBuffers:
    """Every tensor of every network has a slice, sized for the largest batch and latent.

    All of it is written anew in every step. A tensor that is equal in several members but for its owner is one slice,
    since only one member runs at a time; the ControlNet, which runs beside a member, has its own conditioning. A
    smaller batch is the start of the slice, so every address is fixed.
    """

    def __init__(self, manifest: Manifest, device: Device, limits: Limits, conditioning: Mapping[str, Buffer]) -> None:
        """``conditioning``: where the arena has the rows of all lanes, by the names of ``conditioning_rows``."""
        self._conditioning = conditioning
        self._device = device
        self._networks = {name: manifest.networks()[name] for name in limits.sides}
        most = limits.batch.max
        self._sizes = io_buffer_sizes(manifest, limits)
        self._slab = Slab(device, self._sizes)
        self._bound: dict[tuple[str, int, bool, Sizes], Bindings] = {}
        self._residuals = sorted(
            {_slice(n, spec) for n, net in self._networks.items() for spec in net.inputs if is_residual(spec.name)}
        )
        self._blank = False  # whether the residuals are zero
        device.upload(self._slab.view("active", (most,), "int32"), np.arange(most, dtype=np.int32))
        self._active = tuple(range(most))

    @property
    def nbytes(self) -> int:
        return self._slab.nbytes

    def bound(self, name: str, lanes: int, guided: bool, sizes: Sizes) -> Bindings:
        """The buffers of network ``name``; always the same ones."""
        found = self._bound.get((name, lanes, guided, sizes))
        if found is None:
            network, dims = self._networks[name], {**dict(sizes), "B": lanes * (2 if guided else 1)}
            buffers = {
                spec.name: self._slab.view(_slice(name, spec), spec.resolve(dims), spec.dtype)
                for spec in (*network.inputs, *network.outputs)
            }
            active = self._slab.view("active", (lanes,), "int32")
            gathered = tuple(
                (self._conditioning[conditioning_name(name, spec)], buffers[spec.name])
                for spec in network.inputs
                if spec.name in conditioning_inputs(network)
            )
            found = Bindings(
                active, buffers["sample"], buffers["timestep"], buffers.get("model_output"), gathered, buffers
            )
            self._bound[name, lanes, guided, sizes] = found
        return found

    def forget(self, name: str, lanes: int, guided: bool, sizes: Sizes) -> None:
        """Lets go of the views; the memory they look at stays."""
        self._bound.pop((name, lanes, guided, sizes), None)

    def activate(self, slots: Sequence[int], lanes: int) -> None:
        """Makes ``slots`` the ones that steps of ``lanes`` lanes run; more lanes than slots are spare positions."""
        active = (*slots, *[-1] * (lanes - len(slots)))
        if self._active[:lanes] != active:
            self._device.upload(self._slab.view("active", (lanes,), "int32"), np.array(active, np.int32))
            self._active = (*active, *self._active[lanes:])

    def blank_residuals(self) -> None:
        """Makes the residuals zero for members that run without control; costs something only after control ran."""
        if not self._blank:
            for name in self._residuals:
                nbytes = self._sizes[name]
                self._device.upload(self._slab.view(name, (nbytes,), "uint8"), np.zeros(nbytes, np.uint8))
        self._blank = True

    def residuals_written(self) -> None:
        self._blank = False

    def close(self) -> None:
        self._bound = {}


def io_buffer_sizes(manifest: Manifest, limits: Limits) -> dict[str, int]:
    """Bytes of every slice."""
    networks = manifest.networks()
    found = {"active": 4 * limits.batch.max}
    for name in limits.sides:
        largest = limits.largest_of(name)
        for spec in (*networks[name].inputs, *networks[name].outputs):
            found[_slice(name, spec)] = spec.nbytes(largest)
    return found


def conditioning_rows(manifest: Manifest, limits: Limits) -> dict[str, int]:
    """Bytes of one lane's largest row of every conditioning input; a multiple of 16 from 16 on, for wide copies."""
    networks = manifest.networks()
    found: dict[str, int] = {}
    for name in limits.sides:
        for spec in networks[name].inputs:
            if spec.name in conditioning_inputs(networks[name]):
                row = spec.nbytes({**limits.largest_of(name), "B": 1})
                found[conditioning_name(name, spec)] = row if row < 16 else -(-row // 16) * 16
    return found


def conditioning_name(owner: str, spec: TensorSpec) -> str:
    """Which rows in the arena an input reads: its network's own, but labels, which all members are given alike."""
    text = f"{spec.name} {spec.dtype}{list(spec.shape[1:])}"
    return text if spec.name == "labels" else f"{owner}: {text}"


def _slice(owner: str, spec: TensorSpec) -> str:
    """Which slice a tensor lives in."""
    own = owner == CONTROLNET and spec.name not in ("sample", "timestep") and not is_residual(spec.name)
    text = f"{spec.name} {spec.dtype}{list(spec.shape[1:])}"
    return f"{owner}: {text}" if own else text
