"""The networks' own graphs on the CPU: bfloat16 widened to float32, inputs recorded while they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from tstitch_engines.backends.base import Backend, Engine
from tstitch_engines.bundle.files import describe_file
from tstitch_engines.bundle.manifest import SCHEMA, Component, EngineIdentity, Member, Network
from tstitch_engines.device.base import Buffer, Device
from tstitch_engines.host_call import Arrays, from_storage
from tstitch_engines.spec import ShapeProfile, TensorSpec

__all__ = ["AnyNetwork", "Recorder", "cpu_identity", "needs_widening", "own_files", "widen_graph", "widened"]

AnyNetwork = TypeVar("AnyNetwork", bound=Network)

_NARROW: Final = "bfloat16"  # ONNX Runtime has no kernels for it on the CPU


class Recorder(Engine):
    """An engine that appends its inputs to ``calls`` before it runs. ``profile``: a part of the engine's own."""

    def __init__(
        self, engine: Engine, device: Device, calls: list[Arrays], profile: ShapeProfile | None = None
    ) -> None:
        super().__init__(engine.inputs, engine.outputs, engine.profile if profile is None else profile)
        self._engine = engine
        self._device = device
        self._calls = calls
        self._buffers: Mapping[str, Buffer] = {}

    def _bind(self, buffers: Mapping[str, Buffer], batch: int) -> None:
        self._engine.bind(buffers, batch=batch, sizes=self.sizes)
        self._buffers = buffers

    def enqueue(self) -> None:
        inputs = {spec.name: self._device.download(self._buffers[spec.name]) for spec in self.inputs}
        self._calls.append({spec.name: from_storage(inputs[spec.name], spec.dtype) for spec in self.inputs})
        self._engine.enqueue()

    def close(self) -> None:
        self._buffers = {}


def cpu_identity(backend: Backend, network: Network, profile: ShapeProfile) -> EngineIdentity:
    """The identity of an engine that is made for one use and not stored."""
    return EngineIdentity(
        schema=SCHEMA,
        backend=backend.name,
        backend_version=backend.version(),
        onnx_sha256="",
        precision=network.precision,
        profile=profile,
        arch=backend.arch("cpu"),
    )


def needs_widening(network: Network) -> bool:
    """Whether the network, or its layers that are not quantised, compute in bfloat16."""
    made = network.quantisation if isinstance(network, Member) else None
    return network.precision == "bf16" or (made is not None and made.high_precision == "bf16")


def widened(network: AnyNetwork) -> AnyNetwork:
    """``network`` with float32 in place of bfloat16."""

    def wide(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            msgspec.structs.replace(spec, dtype="float32") if spec.dtype == _NARROW else spec for spec in specs
        )

    precision = "fp32" if network.precision == "bf16" else network.precision
    return msgspec.structs.replace(
        network, precision=precision, inputs=wide(network.inputs), outputs=wide(network.outputs)
    )


def widen_graph(model: Path, target: Path) -> Path:
    """Writes ``model`` to ``target`` with float32 in place of bfloat16."""
    from tstitch_export.onnx_export.graph import retyped_to_float32

    retyped_to_float32(model, target, _NARROW)
    return target


def own_files(model: Path) -> tuple[Component, ...]:
    """The files of a graph that ``widen_graph`` wrote, for ``Network.onnx``."""
    files = (model, model.with_name(f"{model.name}.data"))
    return tuple(describe_file(file) for file in files if file.exists())
