"""Graphs whose weights are stored in half the bytes: float16 initialisers behind a Cast, which every compiler folds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BuildFailed
from tstitch_engines.needs import require
from tstitch_export.checkpoint.safetensors_file import read_safetensors_header

__all__ = ["refer_to_safetensors", "store_half"]

_FLOAT, _HALF, _BFLOAT = 1, 10, 16  # onnx.TensorProto element types
_REAL: Final = (_FLOAT, _HALF, _BFLOAT)
_Key = tuple[tuple[int, ...], bytes]
_SMALL: Final = 64  # elements up to which a tensor stays in the graph


def store_half(model: Any) -> None:
    """Stores every large float32 initialiser of an ONNX model as float16. Values are rounded to float16."""
    onnx = require("onnx", "packing a graph")
    graph = model.graph
    for tensor in list(graph.initializer):
        if tensor.data_type == _FLOAT and np.prod(tensor.dims) > _SMALL:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            stored = onnx.numpy_helper.from_array(values, f"{tensor.name}.half")
            _replace(graph, tensor, stored, transposed=False)


def refer_to_safetensors(model: Any, weights: Path) -> None:
    """Drops the graph's own copy of its weights: they are read from the safetensors file beside it.

    A safetensors file is raw little-endian data, which ONNX external data may point into. Each large initialiser is
    found in the file by value, rounded to the graph's type, as it is or transposed. It gets a Cast to that type (and a
    Transpose), which a compiler folds. float32 tables stay in the graph. Raises ``BuildFailed`` when a weight is not in
    the file.
    """
    from safetensors.numpy import load_file

    onnx = require("onnx", "packing a graph")
    loaded: Mapping[str, NDArray[Any]] = load_file(weights)
    header = read_safetensors_header(weights)
    graph = model.graph
    stored: dict[str, Any] = {}
    known: dict[int, tuple[dict[_Key, str], dict[_Key, str], set[_Key]]] = {}
    for tensor in list(graph.initializer):
        if tensor.data_type not in _REAL or np.prod(tensor.dims) <= _SMALL:
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        as_is, flipped, tables = known.setdefault(tensor.data_type, _by_value(loaded, kind))
        key = _fingerprint(onnx.numpy_helper.to_array(tensor))
        name = as_is.get(key) or flipped.get(key)
        if name is None:
            if key in tables or np.prod(tensor.dims) <= 1024:
                continue  # a table: of positions, or of the tracer's own such as the timestep frequencies
            raise BuildFailed(
                f"{weights.name} has no tensor equal to the graph's {tensor.name} {list(tensor.dims)}",
                hint="export the graph from exactly these weights, rounded to float16",
            )
        entry = header[name]
        external = stored.get(name)
        if external is None:
            external = onnx.TensorProto(name=f"{name}.stored", data_type=_HALF)
            external.dims.extend(entry.shape)
            external.data_location = onnx.TensorProto.EXTERNAL
            places = {"location": weights.name, "offset": str(entry.start), "length": str(entry.length)}
            for field, value in places.items():
                external.external_data.add(key=field, value=value)
            stored[name] = external
        _replace(graph, tensor, external, transposed=key not in as_is)


def _by_value(
    loaded: Mapping[str, NDArray[Any]], kind: np.dtype[Any]
) -> tuple[dict[_Key, str], dict[_Key, str], set[_Key]]:
    """Names of the float16 tensors by their values in the type ``kind`` and by those transposed; float32 tables."""
    rounded = {name: value.astype(kind) for name, value in loaded.items()}
    halves = {name: value for name, value in rounded.items() if loaded[name].dtype == np.float16}
    tables = {_fingerprint(value) for name, value in rounded.items() if loaded[name].dtype == np.float32}
    flipped = {_fingerprint(value.T): name for name, value in halves.items() if value.ndim == 2}
    return {_fingerprint(value): name for name, value in halves.items()}, flipped, tables


def _replace(graph: Any, tensor: Any, stored: Any, *, transposed: bool) -> None:
    """Puts ``stored`` (shared ones once) and the nodes that turn it into what ``tensor`` was."""
    onnx = require("onnx", "packing a graph")
    graph.initializer.remove(tensor)
    if all(existing.name != stored.name for existing in graph.initializer):
        graph.initializer.append(stored)
    source, nodes = stored.name, []
    if transposed:
        nodes.append(onnx.helper.make_node("Transpose", [source], [f"{tensor.name}.transposed"], perm=[1, 0]))
        source = f"{tensor.name}.transposed"
    nodes.append(onnx.helper.make_node("Cast", [source], [tensor.name], to=tensor.data_type))
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)


def _fingerprint(values: NDArray[Any]) -> _Key:
    return values.shape, np.ascontiguousarray(values, np.float32).tobytes()
