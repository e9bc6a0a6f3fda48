"""Finds the first layer at which two graphs of one model differ, with every intermediate tensor as an output."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends.onnx_session import open_session
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import EngineRecord, siblings
from tstitch_engines.bundle.onnx_files import NotOnnx, check_onnx
from tstitch_engines.errors import FailedWork, Unsafe
from tstitch_engines.host_call import Arrays
from tstitch_engines.needs import require
from tstitch_engines.threads import default_threads
from tstitch_trt.verify.error import Error, measure_error

__all__ = ["LayerCheck", "LayerDifference", "compare_layers", "first_difference"]

_FLOATS = {"float32": np.float32, "float16": np.float16}


class LayerDifference(msgspec.Struct, frozen=True, kw_only=True):
    """``position``: of the node in the graph, from 1 on, of ``nodes``; ``tensor``: its output that differs."""

    position: int
    nodes: int
    node: str
    op: str
    tensor: str
    error: Error


class LayerCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``tensors`` that both graphs have and that were compared, in topological order; ``first`` beyond ``limit``.

    ``reason``: why nothing was compared.
    """

    member: str
    compared: str
    limit: float
    tensors: int
    first: LayerDifference | None
    reason: str | None = None


class _Layer(NamedTuple):
    position: int
    node: str
    op: str
    tensor: str


def compare_layers(
    bundle: Bundle, name: str, records: Sequence[EngineRecord], inputs: Arrays, limit: float, folder: Path
) -> list[LayerCheck]:
    """Compares the graphs of ONNX Runtime's engines with their ONNX, and an fp16 graph with the same in float32.

    Other engines do not show what their layers compute. ``inputs``: float32 and integers, rounded to the network's
    precision. Raises ``Unavailable`` without onnx.
    """
    require("onnx", "--layers")
    network = bundle.manifest.networks()[name]
    graph = bundle.path(network.onnx[0])
    feeds = {spec.name: inputs[spec.name].astype(_FLOATS.get(spec.dtype, np.int64)) for spec in network.inputs}
    found: list[LayerCheck] = []

    def note(compared: str, reason: str) -> None:
        found.append(LayerCheck(member=name, compared=compared, limit=limit, tensors=0, first=None, reason=reason))

    for record in records:
        identity = record.identity
        compared = f"its {identity.backend} engine with its ONNX"
        if identity.backend != "onnxruntime":
            note(compared, f"{identity.backend} engines do not show what their layers compute")
        elif network.precision == "bf16":
            note(compared, "ONNX Runtime has no bfloat16 kernels on the CPU")
        elif identity.arch.startswith("sm_"):
            note(compared, f"the engine is for a GPU ({identity.arch}) and holds its operators only")
        else:
            engine = bundle.path(record.files[0])
            try:
                check_onnx(engine, siblings(record.files))
            except NotOnnx as error:
                note(compared, str(error))
            except Unsafe as error:
                note(compared, error.message)
            else:
                found.append(first_difference(name, compared, (graph, feeds), (engine, feeds), limit))
    if network.precision == "fp16":
        from tstitch_export.onnx_export.graph import retyped_to_float32

        twin = folder / f"{name}-float32.onnx"
        retyped_to_float32(graph, twin, "float16")
        wide = {key: value.astype(np.float32) if value.dtype.kind == "f" else value for key, value in feeds.items()}
        compared = "its fp16 ONNX with the same graph in float32"
        found.append(first_difference(name, compared, (twin, wide), (graph, feeds), limit))
    return found


def first_difference(
    member: str,
    compared: str,
    reference: tuple[Path, dict[str, NDArray[Any]]],
    other: tuple[Path, dict[str, NDArray[Any]]],
    limit: float,
) -> LayerCheck:
    """Runs both graphs, unoptimised, on the CPU and compares, in the order of ``reference``, the tensors of one name.

    A compiler keeps a tensor's name where it keeps the tensor; one that it laid out anew (another shape) is left out.
    """
    values, layers = _run(*reference)
    others, _ = _run(*other)
    compared_tensors, first = 0, None
    for layer in layers:
        want, got = values[layer.tensor], others.get(layer.tensor)
        if want.dtype.kind != "f" or got is None or got.shape != want.shape or got.dtype.kind != "f":
            continue
        compared_tensors += 1
        error = measure_error(got, want)
        if first is None and not error.within(limit):
            first = LayerDifference(**layer._asdict(), nodes=layers[-1].position, error=error)
    return LayerCheck(member=member, compared=compared, limit=limit, tensors=compared_tensors, first=first)


def _run(path: Path, feeds: dict[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], list[_Layer]]:
    """Every node's outputs by name, and the nodes in topological order."""
    import onnx
    import onnxruntime

    model = onnx.load(str(path))
    layers = [
        _Layer(position, node.name or f"{node.op_type} {position}", node.op_type, tensor)
        for position, node in enumerate(model.graph.node, start=1)
        for tensor in node.output
        if tensor
    ]
    have = {output.name for output in model.graph.output}
    # without a type: ONNX Runtime finds it out by itself
    model.graph.output.extend(onnx.ValueInfoProto(name=layer.tensor) for layer in layers if layer.tensor not in have)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = default_threads()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="tstitch-layers-") as folder:
        opened = Path(folder) / "model.onnx"
        onnx.save_model(model, str(opened), save_as_external_data=True, location="model.data", size_threshold=1024)
        try:
            session = open_session(opened, ("model.data",), settings=settings)
            names = [output.name for output in session.get_outputs()]
            return dict(zip(names, session.run(names, feeds), strict=True)), layers
        except Exception as error:
            raise FailedWork(
                f"ONNX Runtime can't run {path.name} with every layer as an output: {error}",
                hint="leave --layers out; tstitch-trt verify alone compares the outputs",
            ) from error
