"""A feature network made by hand: its features are the mean of each channel, its logits the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["means_network"]


def means_network(folder: Path, *, channels: int) -> tuple[Path, Path]:
    """Writes the network and the statistics of a standard normal; returns their paths."""
    import onnx
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", channels, "H", "W"])
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", channels]) for n in ("features", "logits")]
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["features"], keepdims=0),
        helper.make_node("Identity", ["features"], ["logits"]),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    graph = helper.make_graph(nodes, "means", [image], outputs, [axes])
    network, reference = folder / "means.onnx", folder / "reference.npz"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), network)
    np.savez(reference, mean=np.zeros(channels), covariance=np.eye(channels), count=10)
    return network, reference
