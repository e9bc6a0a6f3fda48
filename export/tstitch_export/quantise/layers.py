"""Which layers of a denoiser's graph are computed in 8 bits, and the graph made ready for it.

In 8 bits: the matrix products of the transformer blocks with weights, which is where the time goes. Not in 8 bits:

- what does not depend on the latent (time and label embedders, adaLN modulation): few rows, and an error there scales
  and shifts every token.
- the first layer after the latent and the last before the output: their loss is lost to all of the model.
- products of two activations (attention): a softmax has few large values, which a common scale serves badly.
- convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tstitch_engines.errors import BadInput, unknown_name
from tstitch_engines.needs import require
from tstitch_export.onnx_export.graph import retyped_to_float32

__all__ = ["Layer", "choose", "find_layers", "is_quantised", "prepare"]

LATENT = "sample"  # the input that every member has
_WEIGHTED = ("MatMul", "Gemm", "Conv")
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_SIZES = ("Shape", "Size")
_FLOAT = 1  # onnx.TensorProto.FLOAT
_INLINE_LIMIT = 3 << 29  # bytes of weights above which they go into a file beside the graph; a protobuf ends at 2 GiB

Place = Literal["inside", "conditioning", "first", "last", "convolution"]


@dataclass(frozen=True)
class Layer:
    """A node with a weight. ``name``: its parameter's where the graph keeps it (``blocks.0.attn.qkv``), else ``node``.

    ``inside`` of the model: a product of tokens and a weight, which may be quantised.
    """

    node: str
    name: str
    place: Place


def is_quantised(model: Path) -> bool:
    """Whether the graph has Q/DQ nodes."""
    onnx = require("onnx", "quantising a member")
    return any(node.op_type in _QDQ for node in onnx.load(model, load_external_data=False).graph.node)


def prepare(model: Path, target: Path, *, precision: str) -> bool:
    """Writes ``model`` to ``target`` in float32 with every weight a plain tensor and every node named.

    A shipped graph reads its weights through Cast and Transpose, which hide them from a quantiser; a half-precision one
    is widened, which loses nothing. ``True`` when the weights went into a file beside ``target``.
    """
    onnx = require("onnx", "quantising a member")
    if precision != "fp32":
        wide = target.with_name(f"wide-{target.name}")
        retyped_to_float32(model, wide, {"fp16": "float16", "bf16": "bfloat16"}[precision])
        model = wide
    graph_model = onnx.load(model)
    graph = graph_model.graph
    _fold(graph)
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    weights = sum(int(np.prod(tensor.dims)) * 4 for tensor in graph.initializer)
    external = weights > _INLINE_LIMIT
    if external:
        onnx.save_model(
            graph_model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024
        )
    else:
        onnx.save_model(graph_model, target)
    return external


def _fold(graph: Any) -> None:
    """Computes every Cast to float32 and Transpose of a stored tensor."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, tuple[str, Any]] = {}  # output -> the stored tensor it came from, its values
    for node in list(graph.node):
        if node.op_type not in ("Cast", "Transpose") or not (node.input[0] in stored or node.input[0] in made):
            continue
        source = node.input[0]
        origin, values = made[source] if source in made else (source, numpy_helper.to_array(stored[source]))
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Cast":
            if attributes["to"].i != _FLOAT or values.dtype.kind != "f":
                continue
            values = values.astype(np.float32)
        else:
            values = values.transpose(list(attributes["perm"].ints) if "perm" in attributes else None)
        made[node.output[0]] = (origin, values)
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for name, (origin, values) in made.items():
        if name in used:
            tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
            tensor.doc_string = origin  # for the layer's name
            graph.initializer.append(tensor)
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def find_layers(model: Path) -> list[Layer]:
    """The layers with weights of a graph written by ``prepare``, in its order."""
    onnx = require("onnx", "quantising a member")
    graph = onnx.load(model, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weighted = {
        node.name: node
        for node in graph.node
        if node.op_type in _WEIGHTED and node.input[1] in stored and node.input[0] not in stored
    }
    latent = _reached(graph, [LATENT], forward=True, stop=())
    first = _reached(graph, [LATENT], forward=True, stop=weighted) & weighted.keys()
    last = _reached(graph, [value.name for value in graph.output], forward=False, stop=weighted) & weighted.keys()
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for name, node in weighted.items():
        place: Place = "inside"
        if name not in latent:
            place = "conditioning"
        elif name in first:
            place = "first"
        elif name in last:
            place = "last"
        elif node.op_type == "Conv":
            place = "convolution"
        found.append(Layer(name, _layer_name(node, stored, readers), place))
    return found


def _reached(graph: Any, tensors: Iterable[str], *, forward: bool, stop: Iterable[str]) -> set[str]:
    """The nodes on paths that start at ``tensors``, up to and with those named in ``stop``."""
    neighbours: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type in _SIZES:  # read of any tensor, wanted by any other: no path of values
            continue
        for name in node.input if forward else node.output:
            neighbours.setdefault(name, []).append(node)
    ends, seen, waiting = set(stop), set[str](), list(tensors)
    while waiting:
        for node in neighbours.get(waiting.pop(), ()):
            if node.name not in seen:
                seen.add(node.name)
                if node.name not in ends:
                    waiting.extend(node.output if forward else node.input)
    return seen


def _layer_name(node: Any, stored: dict[str, Any], readers: dict[str, list[Any]]) -> str:
    """The tracer renames a linear layer's weight, but not its bias."""
    weight = stored[node.input[1]]
    candidates = [weight.name, weight.doc_string]
    for reader in readers.get(node.output[0], ()):
        if reader.op_type == "Add":
            candidates += [name for name in reader.input if name in stored]
    for candidate in candidates:
        plain = str(candidate).removesuffix(".stored").removesuffix(".half")
        for ending in (".weight", ".bias"):
            if plain.endswith(ending):
                return plain.removesuffix(ending)
    return str(node.name)


def choose(layers: Sequence[Layer], keep: Sequence[str]) -> tuple[list[Layer], list[Layer]]:
    """The layers to quantise, and those that could be and stay in high precision because ``keep`` names them.

    ``keep``: names of layers or nodes, or patterns with ``*``. Raises ``UnknownName`` for one that matches nothing,
    ``BadInput`` when nothing is left.
    """
    able = [layer for layer in layers if layer.place == "inside"]
    kept: set[str] = set()
    for pattern in keep:
        hits = {layer.node for layer in able if fnmatchcase(layer.name, pattern) or fnmatchcase(layer.node, pattern)}
        if not hits:
            raise unknown_name(
                "layer", pattern, [layer.name for layer in able], hint="(a pattern may be given: --keep 'blocks.0.*')"
            )
        kept |= hits
    chosen = [layer for layer in able if layer.node not in kept]
    if not chosen:
        left = "all of them are kept" if able else "it has none between its first and its last one"
        raise BadInput(
            f"the graph has no layer left to quantise: {left}",
            hint="give fewer --keep; or leave this member as it is" if able else "leave this member as it is",
        )
    return chosen, [layer for layer in able if layer.node in kept]
