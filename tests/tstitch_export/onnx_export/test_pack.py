"""Packed graphs: weights stored once, in half the bytes, read out of the safetensors file by offset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from support.dits import published_model
from tstitch_engines.errors import BadBundle, BuildFailed
from tstitch_export.onnx_export.pack import refer_to_safetensors, store_half
from tstitch_export.pack_pair import pack_member
from tstitch_export.planning.recipe import MemberRecipe
from tstitch_export.planning.shipped import read_shipped

RECIPE = MemberRecipe(family="dit", parametrisation="v", options={"num_heads": 4})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    torch.save(published_model(depth=1).state_dict(), folder / "trained.pt")
    (folder / "out").mkdir()
    pack_member("tiny", RECIPE, folder / "trained.pt", folder / "out")
    return folder / "out"


def rounded_model() -> torch.nn.Module:
    model: torch.nn.Module = published_model(depth=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model


def test_packed_graph_equals_pytorch_at_float16_rounded_weights(packed: Path) -> None:
    session = onnxruntime.InferenceSession(str(packed / "tiny.onnx"), providers=["CPUExecutionProvider"])
    model = rounded_model()
    for batch in (1, 4):
        torch.manual_seed(batch)
        x, t, y = torch.randn(batch, 4, 8, 8), torch.rand(batch) * 999, torch.randint(0, 6, (batch,))
        with torch.no_grad():
            want = model(x, t, y).numpy()
        got = session.run(None, {"sample": x.numpy(), "timestep": t.numpy(), "labels": y.numpy()})[0]
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_the_graph_has_no_copy_of_the_weights(packed: Path) -> None:
    weights = load_file(packed / "tiny.safetensors")
    assert {name for name, value in weights.items() if value.dtype != np.float16} == {"pos_embed"}
    graph = onnx.load(packed / "tiny.onnx", load_external_data=False).graph
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    raw = (packed / "tiny.safetensors").read_bytes()
    for tensor in external:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "tiny.safetensors"
        start = int(place["offset"])
        stored = np.frombuffer(raw[start : start + int(place["length"])], np.float16).reshape(tuple(tensor.dims))
        assert np.array_equal(stored, weights[tensor.name.removesuffix(".stored")])
    inside = sum(len(t.raw_data) for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL)
    assert inside < 0.2 * len(raw), "only small tables and biases"
    assert {t.name.removesuffix(".stored") for t in external} == {n for n, v in weights.items() if v.size > 64}- {
        "pos_embed"
    }  # fmt: skip


def test_an_engine_made_from_it_stands_alone(packed: Path, tmp_path: Path) -> None:
    """A compiler folds the casts: with nothing left to refer to, a graph optimised to one file loads anywhere."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "engine.onnx")
    onnxruntime.InferenceSession(str(packed / "tiny.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "engine.onnx").graph
    assert not {node.op_type for node in graph.node} & {"Cast"}
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in graph.initializer}
    onnxruntime.InferenceSession(str(tmp_path / "engine.onnx"), providers=["CPUExecutionProvider"])


def test_record(packed: Path, tmp_path: Path) -> None:
    record = read_shipped(packed / "tiny.json")
    assert record.member.check is not None
    assert record.member.check.rel_l2 < 1e-5
    assert record.member.sources[0].shipped
    assert [part.path for part in record.member.onnx] == ["tiny.onnx", "tiny.safetensors"]
    for name in ("tiny.json", "tiny.onnx", "tiny.safetensors"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    damaged = bytearray((packed / "tiny.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "tiny.safetensors").write_bytes(damaged)
    with pytest.raises(BadBundle, match="altered since it was packed"):
        read_shipped(tmp_path / "tiny.json")
    (tmp_path / "tiny.onnx").unlink()
    with pytest.raises(BadBundle, match="is damaged"):
        read_shipped(tmp_path / "tiny.json")


def test_weights_that_are_not_the_graphs_own_are_refused(packed: Path, tmp_path: Path) -> None:
    weights = {name: value + np.float16(1) for name, value in load_file(packed / "tiny.safetensors").items()}
    save_file(weights, tmp_path / "other.safetensors")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, ["B", 64])],
            [onnx.helper.make_tensor_value_info("y", 1, ["B", 64])],
            [onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")],
        )
    )
    with pytest.raises(BuildFailed, match="no tensor equal to the graph's w"):
        refer_to_safetensors(model, tmp_path / "other.safetensors")


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    state = published_model(depth=1).state_dict()
    state["blocks.0.mlp.fc1.weight"][0, 0] = 70_000
    torch.save(state, tmp_path / "large.pt")
    with pytest.raises(BuildFailed, match=r"fc1\.weight holds values that float16 can't, up to 7e\+04"):
        pack_member("tiny", RECIPE, tmp_path / "large.pt", tmp_path)


def test_store_half_rounds_and_keeps_the_function() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16), dtype=np.float32)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, ["B", 16])],
            [onnx.helper.make_tensor_value_info("y", 1, ["B", 16])],
            [onnx.numpy_helper.from_array(weight, "w")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    store_half(model)
    onnx.checker.check_model(model, full_check=True)
    assert [t.data_type for t in model.graph.initializer] == [onnx.TensorProto.FLOAT16]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.eye(16, dtype=np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], weight.astype(np.float16).astype(np.float32))
