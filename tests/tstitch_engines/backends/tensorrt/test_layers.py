"""What plans are made of: read from TensorRT-RTX's own log, and from the inspector's JSON in both of its forms."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from support.dits import published_state
from support.exports import graph_of, network_plan, onnx_of
from support.rtx_families import CHECKPOINTS
from support.tensorrt_builds import compile_member, shipped_small
from support.tensorrt_stand import Place, Stand, opened
from tstitch_engines.backends import open_backend
from tstitch_engines.backends.tensorrt import TensorRtBackend
from tstitch_engines.backends.tensorrt.flavour import TENSORRT
from tstitch_engines.backends.tensorrt.inspector import list_layers
from tstitch_engines.backends.tensorrt.layers import (
    Layer,
    layers_file,
    parse_inspector,
    parse_log,
    read_layers,
    summarise,
    suspicions,
)
from tstitch_engines.backends.tensorrt.library import session
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Component, Member, Precision
from tstitch_engines.errors import BadEngine, FailedWork, UnknownName
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.quantise.quantise import float32_specs, quantise_graph

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
needs_modelopt = pytest.mark.skipif(find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")

# Small. At DiT-XL's width the products are the same ones, and an 8-bit member moves its keys in two passes more.
DEPTH, WIDTH, SIZE = 2, 32, 16


def blocks_of(precision: Precision, folder: Path) -> tuple[Member, Path]:
    """A DiT of two blocks and its graph."""
    from safetensors.torch import save_file

    save_file(published_state(depth=DEPTH, width=WIDTH, heads=2, size=SIZE), folder / "DiT.safetensors")
    return member_of("dit", folder / "DiT.safetensors", {"num_heads": 2}, precision, folder)


def member_of(
    family: str, path: Path, options: dict[str, Any], precision: Precision, folder: Path
) -> tuple[Member, Path]:
    """Exported into ``folder``, and quantised there to an 8-bit precision."""
    eight_bit = precision in ("int8", "fp8")
    plan = network_plan(family, path, options, "fp32" if eight_bit else precision)
    network = onnx_of(plan, folder)
    graph = graph_of(network, folder)
    member = msgspec.structs.replace(
        shipped_small()[0], inputs=network.inputs, outputs=network.outputs, onnx=network.onnx, precision=plan.precision
    )
    if not eight_bit:
        return member, graph
    rng = np.random.default_rng(0)
    calibration = {
        spec.name: rng.integers(0, 5, 8)
        if spec.dtype == "int64"
        else 999 * rng.random(8, np.float32)
        if spec.name == "timestep"
        else rng.standard_normal(spec.resolve({"B": 8, "T": 77, "H": 8, "W": 8}), np.float32)
        for spec in member.inputs
    }
    model = folder / "quantised.onnx"
    quantise_graph(graph, model, member=member, mode=precision, calibration=calibration)
    sha256, size = hash_file(model)
    return msgspec.structs.replace(
        member,
        inputs=float32_specs(member.inputs),
        outputs=float32_specs(member.outputs),
        onnx=(Component(path=model.name, sha256=sha256, bytes=size),),
        precision=precision,
    ), model


def compiled(member: Member, model: Path, folder: Path) -> tuple[Layer, ...]:
    backend = open_backend("tensorrt-rtx")
    assert isinstance(backend, TensorRtBackend)
    ranges = {"B": Range(1, 2, 4), "T": Range(77, 77, 77), "H": Range(8, 8, 8), "W": Range(8, 8, 8)}
    plan, *_ = backend.compile(
        member=member,
        model=model,
        profile=ShapeProfile({dim: ranges[dim] for dim in member.dims}),
        device="cpu",
        options={"profiling-verbosity": "detailed", "compute-capabilities": "8.9"},
        output=folder / "plan.rtx",
        progress=silent,
    )
    found = read_layers(plan, [layers_file(plan).name], again="")
    assert found is not None
    assert (found.source, found.library) == ("build log", f"TensorRT-RTX {backend.version()}")
    return found.layers


def before_attention(layers: tuple[Layer, ...]) -> list[set[str]]:
    """For each attention the kinds of the layers that write what it reads."""
    makers = {tensor.name: layer for layer in layers for tensor in layer.outputs}
    return [
        {makers[tensor.name].name for tensor in layer.inputs if tensor.name in makers}
        for layer in layers
        if layer.kind == "attention"
    ]


@needs_rtx
@needs_modelopt
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_all_four_products_of_a_block_are_in_8_bits(precision: Precision, tmp_path: Path) -> None:
    layers = compiled(*blocks_of(precision, tmp_path), tmp_path)
    summary = summarise(layers)
    assert summary.products[precision] == 4 * DEPTH
    assert suspicions(layers, precision) == ()
    assert summary.attention == {"fp16": DEPTH}
    assert [len(makers) for makers in before_attention(layers)] == [1] * DEPTH, "one pass over query, key and value"
    assert summary.copies is not None
    assert summary.copies <= 1
    assert summary.passes is not None
    assert summary.passes <= 5


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_attention_in_half_precision_is_fused_and_read_in_one_pass(precision: Precision, tmp_path: Path) -> None:
    layers = compiled(*blocks_of(precision, tmp_path), tmp_path)
    summary = summarise(layers)
    assert summary.attention == {precision: DEPTH}
    assert "softmax" not in summary.kinds
    assert suspicions(layers, precision) == ()
    assert [len(makers) for makers in before_attention(layers)] == [1] * DEPTH
    assert summary.passes is not None
    assert summary.passes <= 4
    assert summary.copies is not None
    assert summary.copies <= 2
    assert summary.streams == 1
    assert set(summary.kinds) <= {"gemm", "attention", "convolution", "copy", "pointwise", "setup"}
    assert any("linear" in node for layer in layers if layer.kind == "gemm" for node in layer.nodes)


@needs_rtx
@needs_modelopt
@pytest.mark.slow
def test_a_unet_s_blocks_are_in_8_bits(tmp_path: Path) -> None:
    """Of a UNet of two transformer blocks; what a block computes of the text alone stays as it is."""
    given = CHECKPOINTS["unet-sd"]["one level"](tmp_path)
    member, model = member_of("unet-sd", given.path, dict(given.options), "int8", tmp_path / "export")
    layers = compiled(member, model, tmp_path)
    assert summarise(layers).products["int8"] == 2 * 6
    assert summarise(layers).attention == {"fp16": 2 * 2}
    assert not [text for text in suspicions(layers, "int8") if "8 bits" in text or "8-bit" in text]


@needs_rtx
def test_float32_has_no_fused_attention(tmp_path: Path) -> None:
    layers = compiled(*blocks_of("fp32", tmp_path), tmp_path)
    assert summarise(layers).kinds["softmax"] == DEPTH
    assert summarise(layers).attention == {}
    assert suspicions(layers, "fp32") == ()
    assert suspicions(layers, "fp16")[0].startswith(f"attention is not fused in {DEPTH} places")


@needs_rtx
def test_layers_are_listed_where_they_are_asked_for(tmp_path: Path) -> None:
    backend = open_backend("tensorrt-rtx")
    assert isinstance(backend, TensorRtBackend)
    member, model = shipped_small()
    plans = set()
    for name in ("none", "names", "detailed"):
        plan = compile_member(backend, member, model, tmp_path / f"{name}.rtx", options={"profiling-verbosity": name})
        plans.add(hash_file(plan))
    assert len(plans) == 3, "the plans differ, so the option is part of what an engine is"
    assert [path.name for path in tmp_path.glob("*.json")] == ["detailed.rtx.layers.json"]
    with pytest.raises(UnknownName, match=r"profiling-verbosity.*'verbose'.*none, names, detailed"):
        compile_member(backend, member, model, tmp_path / "x.rtx", options={"profiling-verbosity": "verbose"})


# --- the list of a build's log


def tensor(name: str, kind: str, shape: str) -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [64,1], StrideOrder: [1,0], Datatype: {kind}, "
        "Format: (Linear) Row major linear format }"
    )


# As TensorRT-RTX 1.7 wrote it of a block whose query, key and value were transposed apart.
WIDENED = (
    "Layers:\n"
    f"Name: __myl_CastMulCastReshTranReshSlicSlicSlicConc_myl0_9, LayerType: kgen, Inputs: [], Constants: "
    f"[ {tensor('scale', 'Half', '1,192')}, {tensor('weight', 'Int8', '64,192')}], Outputs: "
    f"[ {tensor('wide', 'Half', '1,64,192')}], TacticName: __myl_CastMul_0x18f4, StreamId: 0, Metadata: \n"
    f"Name: __myl_CastMulFc_myl0_10, LayerType: runtime_fusion, Inputs: [ {tensor('x', 'Int8', '-1,64')}, "
    f"{tensor('wide', 'Half', '1,64,192')}], Constants: [], Outputs: [ {tensor('qkv', 'Half', '1,-1,192')}], "
    "TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_MatMul_26][ONNX Layer: node, with comma]\n"
    "\nI/O Tensors:\n Name: sample, IOMode: Input\n"
)


def test_weights_that_are_widened_at_run_time_are_named() -> None:
    layers = parse_log(WIDENED)
    assert [(layer.kind, layer.precision) for layer in layers] == [("pointwise", "fp16"), ("gemm", "fp16")]
    assert layers[0].constants[1].shape == (64, 192)
    assert layers[1].inputs[0].shape == (-1, 64)
    assert layers[1].nodes == ("node_MatMul_26", "node, with comma")
    assert suspicions(layers, "int8") == (
        "no matrix product is in 8 bits, though the network is int8",
        "1 layers widen 8-bit weights on every call, for products in more bits",
    )


def test_a_log_in_another_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="a layer in another form: Layer 1: gemm"):
        parse_log("Layers:\nLayer 1: gemm\n")


# --- the inspector's JSON


def inspected(eleven: bool) -> dict[str, Any]:
    """As documented of 10.x (one field for type and format, ``Bindings``) and 11.x (two, ``I/O Tensors``)."""

    def one(name: str, kind: str, form: str, shape: list[int]) -> dict[str, Any]:
        said = {"Datatype": kind, "Format": form} if eleven else {"Format/Datatype": f"{form} {kind} format"}
        return {"Name": name, "Location": "Device", "Dimensions": shape, **said}

    def layer(name: str, kind: str, inputs: list[Any], outputs: list[Any], **more: Any) -> dict[str, Any]:
        return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs, "TacticName": "t", **more}

    x, half = one("x", "Float", "Row major linear", [2, 64]), one("h", "Half", "Row major linear", [2, 64])
    byte = one("i", "Int8", "Thirty-two wide channel vectorized row major", [2, 64])
    nodes = "[ONNX Layer: /qk]\x1e[ONNX Layer: /av]"
    layers = [
        layer("Reformatting CopyNode for Input Tensor 0 to a", "Reformat", [x], [half], Origin="REFORMAT"),
        layer("a", "CaskConvolution", [byte], [byte], Weights={"Type": "Int8", "Count": 4096}),
        layer("b", "gemm", [byte], [half], Constants=[one("w", "Int8", "Row major linear", [64, 64])], StreamId=1),
        layer("_gemm_mha_v2_myl0_4", "kgen", [half, half, half], [half], Metadata=nodes),
        layer("__myl_MoveReshTran_myl0_5", "kgen", [half], [half]),
        layer("c", "CaskGemmMatrixMultiply", [half, half], [half]),
        layer("d", "SoftMaxV2", [half], [half]),
        layer("e", "NoOp", [one("y", "N/A due to dynamic shapes", "", [-1])], [half]),
        layer("f", "PointWiseV2", [half], [half]),
    ]  # fmt: skip
    return {"Layers": layers, **({"I/O Tensors": [{"Name": "x"}]} if eleven else {"Bindings": ["x"]})}


@pytest.mark.parametrize("eleven", [False, True])
def test_both_forms_of_the_inspector_are_read_alike(eleven: bool) -> None:
    layers = parse_inspector(json.dumps(inspected(eleven)))
    assert [layer.kind for layer in layers] == [
        "copy", "convolution", "gemm", "attention", "copy", "gemm", "softmax", "setup", "pointwise",
    ]  # fmt: skip
    assert [layer.precision for layer in layers] == ["fp32", "int8", "int8", *["fp16"] * 4, "?", "fp16"]
    assert layers[1].constants[0].dtype == "int8"
    assert layers[3].nodes == ("/qk", "/av")
    summary = summarise(layers)
    assert (summary.products, summary.attention) == ({"int8": 1, "fp16": 1}, {"fp16": 1})
    assert (summary.passes, summary.copies, summary.streams) == (1, 1, 2)


def test_of_names_the_kinds_that_names_tell_are_known() -> None:
    layers = parse_inspector(json.dumps({"Layers": ["_gemm_mha_v2_myl0_4", "__myl_ReshTran_myl0_1", "conv + relu"]}))
    assert suspicions(layers, "int8") == (), "names tell no types"
    assert [layer.kind for layer in layers] == ["attention", "copy", "unknown"]


@pytest.mark.parametrize(
    "text",
    [
        *('{"Bindings": []}', "[]", "", '{"Layers": {}}', '{"Layers": [[]]}', '{"Layers": [{"StreamId": null}]}'),
        '{"Layers": [{"Inputs": [{"Name": "a", "Dimensions": null}]}]}',
    ],
)
def test_json_without_layers_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"no list of layers|Expecting value|a layer in another form"):
        parse_inspector(text)


def test_a_loaded_plan_is_asked(tmp_path: Path) -> None:
    stand = Stand(TENSORRT)
    stand.information = json.dumps(inspected(eleven=True))
    engine = opened(stand, Place(), tmp_path, TENSORRT)
    found = engine.layers()
    assert (found.source, found.library) == ("engine inspector", "TensorRT 1.7.1.116")
    assert found.layers == parse_inspector(stand.information)
    stand.information = "Profiling verbosity is NONE"
    with pytest.raises(FailedWork, match=r"tells no layers of the engine small\.plan") as caught:
        engine.layers()
    assert "--profiling-verbosity detailed" in caught.value.hint


def test_a_build_on_a_gpu_without_a_list_in_its_log_asks_the_plan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand = Stand(TENSORRT)
    stand.information = json.dumps(inspected(eleven=False))
    plan = tmp_path / "a.trt"
    plan.write_bytes(b"a plan")
    with session(TENSORRT, stand.library) as listening:
        assert list_layers(listening, plan, on_gpu=True)
        found = read_layers(plan, [layers_file(plan).name], again="")
        assert found is not None
        assert found.layers == parse_inspector(stand.information)
        layers_file(plan).unlink()
        assert not list_layers(listening, plan, on_gpu=False)
        stand.refuse.add("deserialize_cuda_engine")
        assert not list_layers(listening, plan, on_gpu=True)
    assert not layers_file(plan).exists()
    assert "the layers of a.trt are not listed: the log of the build has none" in caplog.text
    assert "the layers of a.trt are not listed: the plan does not load" in caplog.text


# --- the file beside a plan


LIST = '{"schema": %d, "source": "build log", "library": "", "layers": [%s]}'


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b'{"schema": 1, "layers": 5}', b"[" * 100_000),
        (LIST % (2, "")).encode(),  # of a later version
        (LIST % (1, ",".join(['{"name": ""}'] * 20_001))).encode(),
    ],
    ids=("empty", "bare", "number", "deep", "later", "long"),
)
def test_a_damaged_list_is_named(content: bytes, tmp_path: Path) -> None:
    plan = tmp_path / "a.rtx"
    layers_file(plan).write_bytes(content)
    with pytest.raises(BadEngine, match=r"the list of layers a\.rtx\.layers\.json can't be read") as caught:
        read_layers(plan, ["a.rtx.layers.json"], again="build it")
    assert caught.value.hint == "compile the engine again: build it"
    assert read_layers(plan, [], again="") is None, "a file that the manifest does not name is not read"
