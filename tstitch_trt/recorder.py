"""The members' own graphs on the CPU: widened where it lacks kernels, and their inputs recorded while they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.backends.base import Engine
from tstitch_engines.device import Buffer, Device
from tstitch_engines.manifest import Member
from tstitch_engines.spec import TensorSpec
from tstitch_trt.caller import Arrays, widen

__all__ = ["Recorder", "widen_graph", "widened"]

_DTYPES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Recorder(Engine):
    """An engine that notes its inputs before it runs."""

    def __init__(self, engine: Engine, device: Device, calls: list[Arrays]) -> None:
        super().__init__(engine.inputs, engine.outputs, engine.profile)
        self._engine = engine
        self._device = device
        self._calls = calls
        self._buffers: Mapping[str, Buffer] = {}

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        self._engine.bind(buffers, batch=batch)
        self._buffers = buffers

    def enqueue(self) -> None:
        inputs = {spec.name: self._device.download(self._buffers[spec.name]) for spec in self.inputs}
        self._calls.append({spec.name: widen(inputs[spec.name], spec.dtype) for spec in self.inputs})
        self._engine.enqueue()

    def close(self) -> None:
        self._buffers = {}


def widened(member: Member) -> Member:
    """``member`` in float32."""
    narrow_type = _DTYPES[member.precision]

    def wide(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            msgspec.structs.replace(spec, dtype="float32") if spec.dtype == narrow_type else spec for spec in specs
        )

    return msgspec.structs.replace(member, precision="fp32", inputs=wide(member.inputs), outputs=wide(member.outputs))


def widen_graph(model: Path, target: Path) -> Path:
    """Writes the bf16 graph ``model`` to ``target`` in float32."""
    from tstitch_export.onnx_graph import retyped_to_float32

    retyped_to_float32(model, target)
    return target
