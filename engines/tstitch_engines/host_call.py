"""Runs one engine with host arrays. Not for sampling: it copies and waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.base import Engine
from tstitch_engines.device.base import Buffer, Device
from tstitch_engines.spec import TensorSpec, parse_dimension, storage_dtype

__all__ = ["Arrays", "HostRunner", "from_storage", "sizes_of", "to_storage"]

Arrays = Mapping[str, NDArray[Any]]  # by tensor name; floating-point ones in float32, whatever the engine wants


def to_storage(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """float32 or integer values as the memory of a ``dtype`` tensor: bfloat16, rounded to nearest even, as its bits."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, storage_dtype(dtype))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_storage(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The inverse: floating-point memory as float32, which holds every float16 and bfloat16 exactly."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def sizes_of(specs: Iterable[TensorSpec], arrays: Arrays) -> dict[str, int]:
    """The size of every named dimension, the batch among them, as the arrays have it."""
    found: dict[str, int] = {}
    for spec in specs:
        for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True):
            if isinstance(dim, str):
                factor, name, part = parse_dimension(dim)
                if part == 1:  # a part is rounded up and tells nothing
                    found.setdefault(name, size // factor)
    return found


class HostRunner:
    """One engine with buffers of its own, one set for each batch and size."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self.engine = engine
        self._device = device
        self._buffers: dict[tuple[tuple[str, int], ...], dict[str, Buffer]] = {}

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Runs the engine once. The outputs are set to NaN before, so that one it does not write can't go unseen."""
        engine, device = self.engine, self._device
        sizes = sizes_of(engine.inputs, inputs)
        key = tuple(sorted(sizes.items()))
        buffers = self._buffers.get(key)
        if buffers is None:
            specs = (*engine.inputs, *engine.outputs)
            buffers = {spec.name: device.empty(spec.resolve(sizes), spec.dtype) for spec in specs}
            self._buffers[key] = buffers
        for spec in engine.inputs:
            device.upload(buffers[spec.name], to_storage(inputs[spec.name], spec.dtype))
        for spec in engine.outputs:
            buffer = buffers[spec.name]
            device.upload(buffer, to_storage(np.full(buffer.shape, np.nan, np.float32), spec.dtype))
        engine.bind(buffers, batch=sizes["B"], sizes=sizes)
        engine.enqueue()
        device.synchronize()
        return {spec.name: from_storage(device.download(buffers[spec.name]), spec.dtype) for spec in engine.outputs}

    def close(self) -> None:
        self.engine.close()
        self._buffers = {}
