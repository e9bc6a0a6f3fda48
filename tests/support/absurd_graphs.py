"""Hand-made members whose graphs are as a stranger may make them: never done, or larger than any memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.hand_made import Made, made_member
from tstitch_engines.bundle.manifest import TextInputs

__all__ = ["endless", "growing", "large_to_fold", "slow_to_fold"]


def _member(name: str, nodes: list[Any], constants: dict[str, Any]) -> Made:
    """A member that adds the scalar ``extra``, the last node's output, to what it computes."""
    from onnx import helper, numpy_helper

    made = made_member(name, inputs={"encoder_hidden_states": ("T", 8)}, text=TextInputs(hidden=(), width=8))
    graph = made.model.graph
    last = graph.node[-1]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items())
    graph.node.insert(len(graph.node) - 1, helper.make_node("Add", [last.input[0], "extra"], ["more"]))
    graph.node[-1].input[0] = "more"
    return made


def slow_to_fold(name: str = "small") -> Made:
    """Thousands of products of constants, which a compiler folds: minutes of work in a file of a megabyte."""
    from onnx import helper

    weight = (np.random.default_rng(0).normal(size=(512, 512)) / 23).astype(np.float32)
    nodes = [helper.make_node("MatMul", [f"c{i}" if i else "w", "w"], [f"c{i + 1}"]) for i in range(10_000)]
    nodes.append(helper.make_node("ReduceMax", [nodes[-1].output[0]], ["extra"], keepdims=0))
    return _member(name, nodes, {"w": weight})


def large_to_fold(name: str = "small") -> Made:
    """A hundred constants of 100 MB each, in a file of a few kilobytes."""
    from onnx import helper

    nodes = [helper.make_node("Expand", ["unit", "sides"], ["c0"])]
    nodes += [helper.make_node("Sin", [f"c{i}"], [f"c{i + 1}"]) for i in range(100)]
    nodes += [
        helper.make_node("Concat", [f"c{i}" for i in range(101)], ["all"], axis=0),
        helper.make_node("ReduceMax", ["all"], ["extra"], keepdims=0),
    ]
    return _member(name, nodes, {"unit": np.float32([1]), "sides": np.int64([25_000_000])})


def endless(name: str = "small", trips: int = 1 << 60) -> Made:
    """A loop that is left for the run: no compiler unrolls it."""
    from onnx import TensorProto, helper

    def scalar(key: str, kind: int) -> Any:
        return helper.make_tensor_value_info(key, kind, [])

    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Sin", ["v"], ["next"])],
        "body",
        [scalar("i", TensorProto.INT64), scalar("go", TensorProto.BOOL), scalar("v", TensorProto.FLOAT)],
        [scalar("on", TensorProto.BOOL), scalar("next", TensorProto.FLOAT)],
    )
    loop = helper.make_node("Loop", ["trips", "yes", "start"], ["extra"], body=body)
    return _member(name, [loop], {"trips": np.int64(trips), "yes": np.bool_(True), "start": np.float32(1)})


def growing(name: str = "small", elements: int = 10**12) -> Made:
    """A tensor of any size, made when the graph runs."""
    from onnx import helper

    nodes = [
        helper.make_node("ConstantOfShape", ["sides"], ["big"]),
        helper.make_node("Sin", ["big"], ["waves"]),
        helper.make_node("ReduceMax", ["waves"], ["extra"], keepdims=0),
    ]
    return _member(name, nodes, {"sides": np.int64([elements])})
