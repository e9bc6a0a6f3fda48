"""Text encoders and the halves of a VAE, called with host arrays.

They run once per request, not once per step, so their inputs and outputs go through the host.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.manifest import Network
from tstitch_engines.device.base import Buffer, Device
from tstitch_engines.device.slab import Slab
from tstitch_engines.errors import NotFinite
from tstitch_engines.host_call import Arrays, from_storage, to_storage
from tstitch_engines.spec import ShapeProfile
from tstitch_engines.trace import span

__all__ = ["Component"]

_SIZES: Final = 32


class Component:
    """A network with its engine. It takes any number of rows; the engine gets as many at a time as it was built for.

    Its buffers are allocated at the first call, as large as the profile allows, and stay where they are. Not for two
    threads at once.
    """

    def __init__(self, name: str, network: Network, engine: Engine, device: Device) -> None:
        self.name = name
        self.network = network
        self._engine = engine
        self.device = device
        self._slab: Slab | None = None
        self._recent: OrderedDict[tuple[tuple[str, int], ...], None] = OrderedDict()  # sizes, the oldest first

    @property
    def profile(self) -> ShapeProfile:
        return self._engine.profile

    @property
    def nbytes(self) -> int:
        """Device memory of its inputs and outputs so far."""
        slab = self._slab  # once: a request of another thread may be making it
        return 0 if slab is None else slab.nbytes

    def __call__(
        self, inputs: Arrays, sizes: Mapping[str, int] | None = None, *, finite: bool = True
    ) -> dict[str, NDArray[np.float32]]:
        """Inputs by name, float32 or integer, ``N`` rows each, to outputs by name. Waits for the device.

        ``sizes``: those of the dimensions besides the batch. Raises ``OutOfProfile``, and ``NotFinite`` where an output
        holds NaN or infinity, unless that is no matter: ``finite=False``.
        """
        rows = len(inputs[self._engine.inputs[0].name])
        most = self.profile.dims["B"].max
        pieces = []
        for start in range(0, rows, most):
            part = {name: values[start : start + most] for name, values in inputs.items()}
            with span(self.name, rows=min(most, rows - start)):
                pieces.append(self._run(part, sizes or {}))
        found = {spec.name: np.concatenate([piece[spec.name] for piece in pieces]) for spec in self._engine.outputs}
        for name, values in found.items():
            if finite and not np.isfinite(values).all():
                raise NotFinite(
                    f"{self.name} gave NaN or infinity in {name!r}",
                    hint=f"its {self.network.precision} may be too narrow: build again with --precision "
                    f"{self.name}=fp32"
                    if self.network.precision == "fp16"
                    else "check what it was given, and the checkpoint",
                )
        return found

    def _run(self, inputs: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
        engine, device = self._engine, self.device
        rows = len(inputs[engine.inputs[0].name])
        batch = self._bucket(rows)
        every = {**sizes, "B": batch}
        self.profile.check(every, what=f"{self.name} engine")
        buffers = self._buffers(every)
        for spec in engine.inputs:
            values = inputs[spec.name]
            spare = np.repeat(values[-1:], batch - rows, axis=0)
            device.upload(buffers[spec.name], to_storage(np.concatenate([values, spare]), spec.dtype))
        engine.bind(buffers, batch=batch, sizes=sizes)
        engine.enqueue()
        self._remember(every)
        found = {spec.name: device.download(buffers[spec.name]) for spec in engine.outputs}
        return {spec.name: from_storage(found[spec.name], spec.dtype)[:rows] for spec in engine.outputs}

    def _remember(self, sizes: Mapping[str, int]) -> None:
        """The engine keeps what it has set up for the last ``_SIZES`` sizes only."""
        key = tuple(sorted(sizes.items()))
        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > _SIZES:
            oldest = dict(self._recent.popitem(last=False)[0])
            self.device.synchronize()
            self._engine.release(self._buffers(oldest), sizes=oldest)

    def _bucket(self, rows: int) -> int:
        """``rows`` rounded up to a power of two within the profile: every other batch is a context of its own."""
        allowed = self.profile.dims["B"]
        return min(max(1 << (rows - 1).bit_length(), allowed.min), allowed.max)

    def _buffers(self, sizes: Mapping[str, int]) -> dict[str, Buffer]:
        specs = (*self._engine.inputs, *self._engine.outputs)
        if self._slab is None:
            largest = {name: allowed.max for name, allowed in self.profile.dims.items()}
            self._slab = Slab(self.device, {spec.name: spec.nbytes(largest) for spec in specs})
        return {spec.name: self._slab.view(spec.name, spec.resolve(sizes), spec.dtype) for spec in specs}

    def close(self) -> None:
        self._slab = None
        self._engine.close()
