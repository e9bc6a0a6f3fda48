"""The compiled layers of a bundle's TensorRT engines: from the loaded plan, or from the list that its build kept."""

from __future__ import annotations

from typing import Literal

import msgspec

from tstitch_engines.backends.base import Engine
from tstitch_engines.backends.tensorrt.engine import TensorRtEngine
from tstitch_engines.backends.tensorrt.flavour import FLAVOURS
from tstitch_engines.backends.tensorrt.layers import (
    Kind,
    LayerSummary,
    LayerTensor,
    PlanLayers,
    read_layers,
    summarise,
    suspicions,
)
from tstitch_engines.backends.tensorrt.options import DEFAULT_LIST
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import EngineRecord, siblings
from tstitch_engines.compile.bundle import compile_command
from tstitch_engines.errors import FailedWork

__all__ = ["CompiledLayer", "LayerList", "detailed_command", "has_layers", "list_layers"]


class CompiledLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: what it is, in our words and the library's, and what it reads and writes. ``nodes``: of the ONNX."""

    kind: Kind
    precision: str
    name: str
    type: str
    kernel: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    nodes: tuple[str, ...]
    stream: int


class LayerList(msgspec.Struct, frozen=True, kw_only=True):
    """``source`` and ``library``: who told them. ``suspicious``: what may cost time, one sentence each."""

    source: Literal["build log", "engine inspector"]
    library: str
    summary: LayerSummary
    suspicious: tuple[str, ...]
    layers: tuple[CompiledLayer, ...]


def has_layers(record: EngineRecord) -> bool:
    """Whether engines of this backend have compiled layers that it tells of."""
    return record.identity.backend in FLAVOURS


def list_layers(bundle: Bundle, record: EngineRecord, engine: Engine | None = None) -> LayerList | str:
    """The layers of one engine, as its plan tells them where ``engine`` is it, loaded; or why there are none.

    ``record``: one that ``has_layers``. Raises ``BadEngine`` for a list that is damaged.
    """
    identity = record.identity
    if isinstance(engine, TensorRtEngine):
        try:
            return _described(engine.layers(), identity.precision)
        except FailedWork as error:
            return error.message
    again = f"{detailed_command(bundle, record)} --fresh"
    found = read_layers(bundle.path(record.files[0]), siblings(record.files), again=again)
    if found is None:
        how = identity.options.get("profiling-verbosity", "the library's own")
        return f"it was compiled with the profiling verbosity {how}: its layers were not listed"
    return _described(found, identity.precision)


def detailed_command(bundle: Bundle, record: EngineRecord) -> str:
    """The command that compiles the engines of this backend with a list of their layers."""
    identity = record.identity
    # Without a list of GPUs of its own TensorRT-RTX compiled for the GPU of the machine, as TensorRT does.
    listed = "compute-capabilities" in identity.options or identity.arch == DEFAULT_LIST
    device = "cpu" if FLAVOURS[identity.backend].compiles_without_gpu and listed else "cuda"
    return f"{compile_command(bundle, identity.backend, device)} --profiling-verbosity detailed"


def _described(found: PlanLayers, precision: str) -> LayerList:
    rows = tuple(
        CompiledLayer(
            kind=layer.kind,
            precision=layer.precision,
            **{name: getattr(layer, name) for name in type(layer).__struct_fields__},
        )
        for layer in found.layers
    )
    return LayerList(
        source=found.source,
        library=found.library,
        summary=summarise(found.layers),
        suspicious=suspicions(found.layers, precision),
        layers=rows,
    )
