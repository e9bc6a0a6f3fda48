"""The map from a checkpoint's weights to a graph's, which an engine needs to replace them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.weights import Stored, Weight, WeightMap
from tstitch_engines.bundle.weights import Weights as StoredWeights
from tstitch_engines.needs import require
from tstitch_engines.spec import ONNX_TYPES, itemsize
from tstitch_export.families.base import LoraTarget

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["locate", "write_weight_map"]

_NAMES: Final = {number: name for name, number in ONNX_TYPES.items()}
_HEAD: Final = 64  # elements that are compared before all are
_LIKE: Final = {4: "int32", 2: "int16"}  # PyTorch's integers of a size: numpy has no bfloat16


def write_weight_map(graph: Path, model: nn.Module, target: LoraTarget, output: Path) -> None:
    """Writes the map of the weights of ``model``, from which ``graph`` was made in the same precision.

    PyTorch's exporter transposes and renames the weights of linear layers: a weight is found by name or by values. One
    tensor at a time is in memory beside the model.
    """
    stored = locate(graph)
    files = [graph, *(graph.parent / name for name in {s.file for s in stored.values()} if name != graph.name)]
    values = StoredWeights(WeightMap(part="", weights={}, initialisers=stored), {file.name: file for file in files})
    parameters = dict(model.named_parameters())
    found: dict[str, Weight] = {}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, place in stored.items():
        by_shape.setdefault(place.shape, []).append(name)
    users: dict[str, int] = {}
    for key, shape in target.shapes.items():
        if not key.endswith(".weight") or len(shape) < 2:
            continue  # biases and norms, which a LoRA leaves alone
        name = target.prefix + key
        if name not in parameters:
            found[key] = Weight(shape=tuple(shape))
            continue
        bits = _bits(parameters[name])
        assert bits.shape == tuple(shape), f"{name} is {bits.shape} in the model and {shape} in the checkpoint"
        held = _find(bits, name, by_shape, values)
        initialiser, transposed = held or (None, False)
        found[key] = Weight(shape=bits.shape, parameter=name, initialiser=initialiser, transposed=transposed)
        if initialiser is not None:
            users[initialiser] = users.get(initialiser, 0) + 1
    for key, weight in found.items():
        if weight.initialiser is not None and users[weight.initialiser] > 1:
            found[key] = msgspec.structs.replace(weight, shared=True)
    written = WeightMap(part=target.part, weights=found, initialisers=stored, aliases=dict(target.aliases))
    output.write_bytes(msgspec.json.encode(written))


def locate(graph: Path) -> dict[str, Stored]:
    """Where the bytes of each initialiser are: in the file of external data, or in the graph's own."""
    onnx = require("onnx", "exporting to ONNX")
    content = graph.read_bytes()
    found: dict[str, Stored] = {}
    cursor = 0
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        kind, shape = _NAMES.get(tensor.data_type), tuple(int(size) for size in tensor.dims)
        if kind is None:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            places = {entry.key: entry.value for entry in tensor.external_data}
            found[tensor.name] = Stored(
                file=places["location"], offset=int(places.get("offset", 0)), dtype=kind, shape=shape
            )
        elif tensor.raw_data and len(tensor.raw_data) == itemsize(kind) * int(np.prod(shape, dtype=np.int64)):
            # Tensors follow each other in the file; bytes that are equal and come earlier do as well.
            cursor = content.index(tensor.raw_data, cursor)
            found[tensor.name] = Stored(file=graph.name, offset=cursor, dtype=kind, shape=shape)
    return found


def _find(
    bits: NDArray[Any], name: str, by_shape: Mapping[tuple[int, ...], Iterable[str]], values: StoredWeights
) -> tuple[str, bool] | None:
    """The initialiser that holds these values, the one of this name before others, and whether transposed."""
    if name in values.map.initialisers and _equal(bits, name, values):
        return name, False
    for other, transposed in ((bits, False), *(((bits.T, True),) if bits.ndim == 2 else ())):
        for candidate in by_shape.get(other.shape, ()):
            if _equal(other, candidate, values):
                return candidate, transposed
    return None


def _equal(bits: NDArray[Any], name: str, values: StoredWeights) -> bool:
    held = values.read(name)
    if held.shape != bits.shape or held.itemsize != bits.itemsize:
        return False
    held = held.view(bits.dtype)
    return np.array_equal(held[:1].flat[:_HEAD], bits[:1].flat[:_HEAD]) and np.array_equal(held, bits)


def _bits(parameter: Tensor) -> NDArray[Any]:
    import torch

    found: NDArray[Any] = parameter.detach().contiguous().view(getattr(torch, _LIKE[parameter.element_size()])).numpy()
    return found
