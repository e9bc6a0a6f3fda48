"""Work on finished ONNX graphs: clean names, a gate that a wrong export does not pass, and a widened twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tstitch_engines.errors import BuildFailed
from tstitch_engines.needs import require
from tstitch_engines.spec import ONNX_TYPES, TensorSpec

__all__ = ["retyped_to_float32", "tidy", "validate"]

_TYPE_ATTRIBUTES: Final = ("to", "softmax_precision")  # those that hold an element type (Cast, Attention)
_CHECKER_LIMIT: Final = 2**31 - 1  # bytes: the type inference of onnx's checker wants one protobuf


def tidy(path: Path, *, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Names the dynamic dimensions as the specs do and drops what torch notes about its own source files.

    The latter differs between machines. Raises ``BuildFailed`` where one size of the graph has two names in the specs.
    """
    onnx = require("onnx", "exporting to ONNX")
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    specs = {spec.name: spec for spec in (*inputs, *outputs)}
    named: dict[str, str] = {}
    for value in (*graph.input, *graph.output):
        shape = specs[value.name].shape if value.name in specs else ()
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=False):
            if not dim.dim_param or dim.dim_param.isdigit() or not isinstance(size, str):
                continue  # `validate` says what is wrong
            if named.setdefault(dim.dim_param, size) != size:
                raise _refused(f"{named[dim.dim_param]} and {size} of {value.name} are one size in it")
            dim.dim_param = size
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    path.write_bytes(model.SerializeToString(deterministic=True))


def validate(path: Path, *, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Raises ``BuildFailed`` unless the graph is well formed and has exactly these inputs and outputs.

    Catches what torch's exporter does without an error: a dimension that it fixed although it was to be dynamic, which
    then is a number or, worse, a name made of digits that a builder takes for dynamic; and operators outside of the
    ONNX standard.
    """
    onnx = require("onnx", "exporting to ONNX")
    small = sum(file.stat().st_size for file in path.parent.iterdir()) < _CHECKER_LIMIT
    try:
        onnx.checker.check_model(str(path), full_check=small)
    except Exception as error:
        raise _refused(f"onnx's checker refuses it: {error}") from error
    model = onnx.load(path, load_external_data=False)
    foreign = sorted({node.domain for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if foreign or len(model.functions):
        raise _refused(f"it uses operators outside of the ONNX standard: {', '.join(foreign) or 'local functions'}")
    sequences = sorted({node.op_type for node in model.graph.node if "Sequence" in node.op_type})
    if sequences:
        raise _refused(f"it uses sequence operators, which TensorRT can't parse: {', '.join(sequences)}")
    for values, specs, what in ((model.graph.input, inputs, "inputs"), (model.graph.output, outputs, "outputs")):
        got = [(v.name, v.type.tensor_type.elem_type, _dims(v)) for v in values]
        want = [(s.name, ONNX_TYPES[s.dtype], s.shape) for s in specs]
        if got != want:
            raise _refused(f"its {what} are {got}; wanted are {want}")


def _dims(value: Any) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_param if dim.HasField("dim_param") else int(dim.dim_value) for dim in dims)


def _refused(reason: str) -> BuildFailed:
    return BuildFailed(
        f"the exported graph is not usable: {reason}",
        hint="please report this with the versions of torch and onnxscript: tstitch-trt doctor",
    )


def retyped_to_float32(path: Path, target: Path, narrow: str = "bfloat16") -> None:
    """Writes the graph at ``path`` to ``target``, every ``narrow`` tensor, constant and cast widened to float32.

    float32 holds every bfloat16 and float16, so the weights keep their values exactly.
    """
    import numpy as np

    onnx = require("onnx", "exporting to ONNX")
    small, wide = ONNX_TYPES[narrow], ONNX_TYPES["float32"]
    model = onnx.load(path)

    def widen(tensor: Any) -> None:
        if tensor.data_type == small:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i == small:
                attribute.i = wide
            if attribute.HasField("t"):
                widen(attribute.t)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == small:
            value.type.tensor_type.elem_type = wide
    onnx.save_model(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)
