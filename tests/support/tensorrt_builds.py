"""Small real compilations for the tests of the TensorRT backends, and graphs made by hand for their corners."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from tstitch_engines.backends.tensorrt import TensorRtBackend
from tstitch_engines.backends.tensorrt.flavour import RTX, Flavour
from tstitch_engines.backends.tensorrt.messages import Request
from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Component, Member, Precision
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range, ShapeProfile, TensorSpec
from tstitch_export.planning.shipped import read_shipped

__all__ = ["attention_graph", "branches_graph", "compile_member", "compile_request", "hand_made", "shipped_small"]


def shipped_small() -> tuple[Member, Path]:
    """The small member of the built-in pair and its ONNX."""
    folder = Path(str(files("tstitch_export") / "pairs" / "fashion"))
    return read_shipped(folder / "small.json").member, folder / "small.onnx"


def compile_member(
    backend: TensorRtBackend,
    member: Member,
    model: Path,
    output: Path,
    *,
    batch: Range | None = None,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] | None = None,
    note: Callable[[str, str], object] = lambda topic, text: None,
) -> Path:
    made, *_ = backend.compile(
        member=member,
        model=model,
        profile=ShapeProfile({"B": batch or Range(1, 2, 4)}),
        device=device,
        options=options or {},
        output=output,
        progress=progress or silent,
        note=note,
    )
    return made


def compile_request(
    member: Member,
    model: Path,
    output: Path,
    *,
    flavour: Flavour = RTX,
    batch: Range | None = None,
    options: BuildOptions | None = None,
) -> Request:
    """What the process that compiles is asked, for work in this one."""
    return Request(
        flavour=flavour.name,
        model=str(model),
        output=str(output),
        family=member.family,
        precision=member.precision,
        inputs=member.inputs,
        outputs=member.outputs,
        profile=ShapeProfile({"B": batch or Range(1, 2, 4)}),
        options=options or BuildOptions(),
        gpu=None,
    )


def hand_made(
    path: Path,
    nodes: Sequence[Any],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    constants: Sequence[Any] = (),
    opset: int = 20,
) -> Member:
    """Writes a graph of these nodes; the member that it would be."""
    import onnx
    from onnx import helper

    kinds = {
        "float32": onnx.TensorProto.FLOAT,
        "float16": onnx.TensorProto.FLOAT16,
        "bfloat16": onnx.TensorProto.BFLOAT16,
    }
    precisions: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

    def value(spec: TensorSpec) -> Any:
        return helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape)

    graph = helper.make_graph(
        list(nodes), "by-hand", [value(s) for s in inputs], [value(s) for s in outputs], list(constants)
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    shipped, _ = shipped_small()
    sha256, size = hash_file(path)
    return msgspec.structs.replace(
        shipped,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        onnx=(Component(path=path.name, sha256=sha256, bytes=size),),
        precision=precisions[inputs[0].dtype],
    )


def attention_graph(path: Path, *, dtype: str, head: int, opset: int = 23) -> Member:
    """Attention over ``[B, 2 heads, 16 tokens, head]`` and a sum: one node, before opset 23 products and softmax."""
    from onnx import helper

    specs = [TensorSpec(name=name, dtype=dtype, shape=("B", 2, 16, head)) for name in ("q", "k", "v", "y")]
    if opset >= 23:
        nodes = [helper.make_node("Attention", ["q", "k", "v"], ["a"])]
    else:
        nodes = [
            helper.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "t"], ["s"]),
            helper.make_node("Softmax", ["s"], ["p"], axis=-1),
            helper.make_node("MatMul", ["p", "v"], ["a"]),
        ]
    return hand_made(path, [*nodes, helper.make_node("Add", ["a", "q"], ["y"])], specs[:3], specs[3:], opset=opset)


def branches_graph(path: Path) -> Member:
    """Two branches over ``[B, 16, 64]`` that may run side by side: product, softmax, product, and their sum."""
    import numpy as np
    from onnx import helper, numpy_helper

    x, y = (TensorSpec(name=name, dtype="float16", shape=("B", 16, 64)) for name in "xy")
    weights = np.random.default_rng(0).standard_normal((4, 64, 64)).astype(np.float16)
    constants = [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)]
    nodes = []
    for a, b in ((0, 1), (2, 3)):
        nodes += [
            helper.make_node("MatMul", ["x", f"w{a}"], [f"m{a}"]),
            helper.make_node("Softmax", [f"m{a}"], [f"s{a}"], axis=-1),
            helper.make_node("MatMul", [f"s{a}", f"w{b}"], [f"m{b}"]),
        ]
    return hand_made(path, [*nodes, helper.make_node("Sum", ["m1", "m3"], ["y"])], [x], [y], constants=constants)
