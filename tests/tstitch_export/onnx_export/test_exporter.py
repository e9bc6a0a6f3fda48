"""Exported graphs: equal to PyTorch on ONNX Runtime, strongly typed, clean, and refused when they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from support.compiled_parts import export_network
from support.dits import diffusers_folder, published_model, published_state
from support.exports import graph_of, network_plan, onnx_of
from support.rtx_families import CHECKPOINTS
from tstitch_engines.errors import BuildFailed
from tstitch_export.families import Family, Inspection, open_family
from tstitch_export.onnx_export import exporter
from tstitch_export.onnx_export.exporter import check_graph, export_onnx
from tstitch_export.onnx_export.graph import validate

DIT = open_family("dit")


def ignore(phase: str, share: float) -> None:
    return


def run(path: Path, sample: Any, timestep: Any, labels: Any) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {"sample": np.asarray(sample), "timestep": np.asarray(timestep), "labels": np.asarray(labels)}
    return session.run(["model_output"], feeds)[0]


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Of the DiT that the tests of every family's engines export too."""
    return DIT.inspect(CHECKPOINTS["dit"]["published"](tmp_path_factory.mktemp("dit")).path, {"num_heads": 2})


@pytest.fixture(scope="module")
def graph(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp32")
    return graph_of(export_network("dit", inspection.path, folder, {"num_heads": 2}), folder)


def assert_close(path: Path, family: Family, inspection: Inspection, model: Any, limit: float) -> None:
    for batch in (1, 2, 5):
        sample, timestep, labels = family.example(inspection, batch=batch, seed=100 + batch)
        with torch.no_grad():
            want = model(sample, timestep, labels).double().numpy()
        kind = np.float16 if limit > 1e-3 else np.float32
        got = run(path, sample.numpy().astype(kind), timestep.numpy(), labels.numpy())
        assert got.dtype == kind
        assert np.abs(got.astype(np.float64) - want).max() <= limit * np.abs(want).max()


def test_fp32_equals_pytorch(graph: Path, inspection: Inspection) -> None:
    assert_close(graph, DIT, inspection, published_model(depth=1, heads=2), 1e-4)


def test_graph_is_portable_and_says_nothing_of_this_machine(graph: Path) -> None:
    model = onnx.load(graph)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input} == {
        "sample": ["B", 4, 8, 8],
        "timestep": ["B"],
        "labels": ["B"],
    }
    (out,) = model.graph.output
    assert [d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim] == ["B", 8, 8, 8]
    content = graph.read_bytes()
    assert b".py" not in content
    assert str(Path.cwd()).encode() not in content


def test_export_is_quiet_reproducible_and_splits_off_large_weights(
    inspection: Inspection,
    graph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exporter, "_INLINE_LIMIT", 0)
    check = export_onnx(DIT, inspection, precision="fp32", folder=tmp_path, progress=ignore)
    assert capfd.readouterr().out == ""
    assert check.rel_l2 < 1e-5
    assert check.batches == (1, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").stat().st_size < graph.stat().st_size / 2
    inline, split = onnx.load(graph), onnx.load(tmp_path / "model.onnx")
    assert [n.SerializeToString() for n in inline.graph.node] == [n.SerializeToString() for n in split.graph.node]
    assert_close(tmp_path / "model.onnx", DIT, inspection, published_model(depth=1, heads=2), 1e-4)


def test_fp16(inspection: Inspection, tmp_path: Path) -> None:
    network = onnx_of(network_plan("dit", inspection.path, {"num_heads": 2}, "fp16"), tmp_path)
    check, path = network.check, graph_of(network, tmp_path)
    assert check is not None
    assert 1e-5 < check.rel_l2 < 1e-2, "float16 keeps 11 bits"
    model = onnx.load(path)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds == {"sample": 10, "timestep": 1, "labels": 7, "model_output": 10}
    # Weights of 11 bits and as many roundings as the graph has products: three times the recorded difference
    assert_close(path, DIT, inspection, published_model(depth=1, heads=2), 1e-2)


def test_bf16(inspection: Inspection, tmp_path: Path) -> None:
    check = export_onnx(DIT, inspection, precision="bf16", folder=tmp_path, progress=ignore)
    assert "widened to float32" in check.against
    assert check.rel_l2 < 1e-2
    model = onnx.load(tmp_path / "model.onnx")
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds == {"sample": 16, "timestep": 1, "labels": 7, "model_output": 16}
    stored = {t.name: t for t in model.graph.initializer}["blocks.0.mlp.fc1.bias"]
    bits = np.frombuffer(stored.raw_data, np.uint16).astype(np.uint32) << 16
    want = published_model(depth=1, heads=2).blocks[0].mlp.fc1.bias.bfloat16().float()
    assert np.array_equal(bits.view(np.float32), want.detach().numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"], "the widened twin is gone"


def test_float16_overflow_is_found(tmp_path: Path) -> None:
    state = published_state(depth=1)
    state["x_embedder.proj.weight"] *= 1e6
    state["final_layer.linear.weight"] *= 1e5
    save_file(state, tmp_path / "model.safetensors")
    found = DIT.inspect(tmp_path / "model.safetensors", {"num_heads": 4})
    with pytest.raises(BuildFailed, match="NaN or infinity in fp16") as caught:
        export_onnx(DIT, found, precision="fp16", folder=tmp_path, progress=ignore)
    assert "bf16" in caught.value.hint


def test_diffusers_folder(tmp_path: Path) -> None:
    model = diffusers_folder(tmp_path / "dit", layers=1)
    found = DIT.inspect(tmp_path / "dit", {})
    (tmp_path / "out").mkdir()
    export_onnx(DIT, found, precision="fp32", folder=tmp_path / "out", progress=ignore)

    def reference(sample: Any, timestep: Any, labels: Any) -> Any:
        return model(sample, timestep=timestep, class_labels=labels).sample

    assert_close(tmp_path / "out/model.onnx", DIT, found, reference, 1e-4)


def specs(inspection: Inspection) -> dict[str, Any]:
    return {"inputs": DIT.inputs(inspection, "fp32"), "outputs": DIT.outputs(inspection, "fp32")}


def test_a_graph_that_computes_something_else_is_refused(graph: Path, inspection: Inspection, tmp_path: Path) -> None:
    model = onnx.load(graph)
    weight = next(t for t in model.graph.initializer if t.name == "blocks.0.mlp.fc1.bias")
    values = onnx.numpy_helper.to_array(weight) + 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BuildFailed, match="differs from PyTorch: relative L2"):
        check_graph(tmp_path / "model.onnx", DIT, inspection, "fp32")


@pytest.mark.parametrize("fault", ["static batch", "digit batch", "type", "name", "domain", "truncated"])
def test_malformed_graphs_are_refused(graph: Path, inspection: Inspection, tmp_path: Path, fault: str) -> None:
    model = onnx.load(graph)
    validate(graph, **specs(inspection))
    path = tmp_path / "model.onnx"
    shape = model.graph.input[0].type.tensor_type
    if fault == "static batch":
        shape.shape.dim[0].dim_value = 2
    elif fault == "digit batch":
        shape.shape.dim[0].dim_param = "2"
    elif fault == "type":
        model.graph.input[2].type.tensor_type.elem_type = 6
    elif fault == "name":
        model.graph.output[0].name = "output"
        model.graph.node[-1].output[0] = "output"
    elif fault == "domain":
        model.graph.node[-1].domain = "com.microsoft"
        model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BuildFailed, match="exported graph is not usable"):
        validate(path, **specs(inspection))
