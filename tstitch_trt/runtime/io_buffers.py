"""The inputs and outputs of all engines that a step runs, as slices of one block of device memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Buffer, Device
from tstitch_engines.device.slab import Slab
from tstitch_engines.host_call import to_storage
from tstitch_engines.spec import TensorSpec
from tstitch_trt.request.conditioning import Part, is_residual
from tstitch_trt.request.limits import Limits, Sizes

__all__ = ["Bindings", "IoBuffers", "io_buffer_sizes"]


@dataclass(frozen=True)
class Bindings:
    """The buffers of one network at one batch and size: ``lanes`` images, both halves of each when guided."""

    active: Buffer
    sample: Buffer
    timestep: Buffer
    model_output: Buffer | None  # a ControlNet has residuals instead
    all: Mapping[str, Buffer]


class IoBuffers:
    """Every tensor of every network has a slice, sized for the largest batch and latent.

    What is written anew in every step (sample, timestep, output, residuals) is one slice for all networks in which it
    is equal but for its owner, since only one member runs at a time; so are labels, which all members are given alike.
    Other conditioning may differ from member to member and is there for the whole trajectory. A smaller batch is the
    start of the slice, so every address is fixed, and the unguided batch is the first half of the guided one.
    """

    def __init__(self, manifest: Manifest, device: Device, limits: Limits) -> None:
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
            found = Bindings(active, buffers["sample"], buffers["timestep"], buffers.get("model_output"), buffers)
            self._bound[name, lanes, guided, sizes] = found
        return found

    def forget(self, name: str, lanes: int, guided: bool, sizes: Sizes) -> None:
        """Lets go of the views; the memory they look at stays."""
        self._bound.pop((name, lanes, guided, sizes), None)

    def fill(self, part: Part, bound: Mapping[str, Bindings]) -> None:
        """Writes conditioning into the buffers of each network; a slice that two of them share is written once."""
        written: set[int] = set()
        for name, values in part.items():
            for key, rows in values.items():
                buffer = bound[name].all[key]
                if buffer.ptr not in written:
                    written.add(buffer.ptr)
                    self._device.upload(buffer, to_storage(rows, buffer.dtype))

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


def _slice(owner: str, spec: TensorSpec) -> str:
    """Which slice a tensor lives in."""
    shared = spec.name in ("sample", "timestep", "labels", "model_output") or is_residual(spec.name)
    text = f"{spec.name} {spec.dtype}{list(spec.shape[1:])}"
    return text if shared else f"{owner}: {text}"
