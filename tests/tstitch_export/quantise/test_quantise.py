"""Q/DQ nodes are where they are to be and nowhere else, and their ranges and weights are the right ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import tstitch_export.quantise.quantise
from support.compare import relative_error
from support.exports import graph_of, network_plan, onnx_of
from support.rtx_families import CHECKPOINTS
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.manifest import Member
from tstitch_engines.errors import BadInput, BuildFailed, Unavailable, UnknownName
from tstitch_export.planning.shipped import read_shipped
from tstitch_export.quantise.layers import find_layers, prepare
from tstitch_export.quantise.quantise import QuantisedGraph, check_quantisable, quantise_graph

needs_modelopt = pytest.mark.skipif(
    find_spec("modelopt") is None, reason='nvidia-modelopt is not installed: pip install ".[quant]"'
)
INSIDE = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
Rows = Mapping[str, NDArray[Any]]


def inputs(rows: int, *, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, 8, 8)).astype(np.float32),
        "timestep": np.linspace(999, 0, rows).astype(np.float32),
        "labels": rng.integers(0, 11, rows),
    }


CALIBRATION = inputs(24, seed=0)


@pytest.fixture(scope="module")
def source(tiny_pair: TinyPair) -> tuple[Member, Path]:
    bundle = open_bundle(tiny_pair.bundle)
    member = bundle.manifest.members["large"]
    return member, bundle.path(member.onnx[0])


@pytest.fixture(scope="module", params=["int8", "fp8"])
def quantised(
    request: pytest.FixtureRequest, source: tuple[Member, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, QuantisedGraph]:
    folder = tmp_path_factory.mktemp(request.param)
    made = quantise_graph(source[1], folder / "q.onnx", member=source[0], mode=request.param, calibration=CALIBRATION)
    assert {path.name for path in folder.iterdir()} == {"q.onnx"}
    return request.param, made


def load(path: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The graph, its stored tensors by name, and the node that makes each tensor."""
    import onnx

    graph = onnx.load(path).graph
    return graph, {t.name: t for t in graph.initializer}, {name: node for node in graph.node for name in node.output}


def session(path: Path, *outputs: str) -> Any:
    import onnx
    import onnxruntime as ort

    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


# --- which layers


def by_place(model: Path, precision: str, folder: Path) -> dict[str, list[str]]:
    prepare(model, folder / "plain.onnx", precision=precision)
    found: dict[str, list[str]] = {}
    for layer in find_layers(folder / "plain.onnx"):
        found.setdefault(layer.place, []).append(layer.name)
    return found


def expected(depth: int) -> dict[str, list[str]]:
    modulation = [f"blocks.{i}.adaLN_modulation.1" for i in range(depth)]
    return {
        "first": ["x_embedder.proj"],
        "conditioning": ["t_embedder.mlp.0", "t_embedder.mlp.2", *modulation, "final_layer.adaLN_modulation.1"],
        "inside": [f"blocks.{i}.{part}" for i in range(depth) for part in INSIDE],
        "last": ["final_layer.linear"],
    }


def test_blocks_are_quantised_and_what_surrounds_them_is_not(source: tuple[Member, Path], tmp_path: Path) -> None:
    found = by_place(source[1], "fp32", tmp_path)
    assert {place: sorted(names) for place, names in found.items()} == {
        place: sorted(names) for place, names in expected(2).items()
    }


def test_sizes_are_no_path_from_the_latent(tmp_path: Path) -> None:
    """A UNet of dynamic sizes reads the latent's shape everywhere, which made most of its layers first ones."""
    given = CHECKPOINTS["unet-sd"]["one level"](tmp_path)
    network = onnx_of(network_plan("unet-sd", given.path, given.options), tmp_path / "export")
    found = by_place(graph_of(network, tmp_path / "export"), "fp32", tmp_path)
    assert found["first"] == ["unet.conv_in"]
    assert found["last"] == ["unet.conv_out"]
    blocks = ("down_blocks.0.attentions.0", "mid_block.attentions.0")
    named = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert {f"unet.{block}.transformer_blocks.0.{part}" for block in blocks for part in named} <= set(found["inside"])
    assert len(found["inside"]) == len(blocks) * (len(named) + 4), "and query, key and value, and the query of the text"


def test_a_shipped_graph_hides_its_weights_behind_casts(tmp_path: Path) -> None:
    from importlib.resources import files

    folder = Path(str(files("tstitch_export"))) / "pairs" / "fashion"
    large = read_shipped(folder / "large.json").member
    found = by_place(folder / large.onnx[0].path, "fp32", tmp_path)
    assert {place: sorted(names) for place, names in found.items()} == {
        place: sorted(names) for place, names in expected(6).items()
    }
    rows = {
        "sample": np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32),
        "timestep": np.array([900, 3], np.float32),
        "labels": np.array([1, 10]),
    }
    (want,), (got,) = (session_at(path).run(None, rows) for path in (folder / "large.onnx", tmp_path / "plain.onnx"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())


def session_at(path: Path) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# --- the graph


@needs_modelopt
def test_exactly_the_blocks_products_read_eight_bits(quantised: tuple[str, QuantisedGraph]) -> None:
    import onnx

    mode, made = quantised
    assert sorted(layer.name for layer in made.quantised) == sorted(expected(2)["inside"])
    kind = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[mode]
    graph, stored, makers = load(made.files[0])
    eight = 0
    for node in graph.node:
        sources = [makers[name] for name in node.input if name in makers]
        dequantised = [s for s in sources if s.op_type == "DequantizeLinear"]
        if not dequantised:
            continue
        assert node.op_type == "MatMul", node.name
        assert len(dequantised) == 2, node.name
        eight += 1
        activation, weight = (makers[name] for name in node.input)
        assert makers[activation.input[0]].op_type == "QuantizeLinear"
        assert stored[weight.input[0]].data_type == kind, "weights are stored in 8 bits"
        assert stored[weight.input[1]].dims == [stored[weight.input[0]].dims[1]], "one scale per output channel"
    assert eight == 8
    untouched = [node for node in graph.node if node.op_type in ("Gemm", "Conv", "Softmax")]
    assert len(untouched) == 2 + 3 + 1 + 2, "embedder, modulation, patches, attention"


@needs_modelopt
def test_ranges_are_the_largest_magnitudes_of_the_calibration(
    quantised: tuple[str, QuantisedGraph], source: tuple[Member, Path]
) -> None:
    import onnx

    mode, made = quantised
    graph, stored, makers = load(made.files[0])
    plain = {node.name: node for node in load(source[1])[0].node}
    read = {layer.node: plain[layer.node].input[0] for layer in made.quantised}
    values = session(source[1], *read.values()).run(list(read.values()), dict(CALIBRATION))
    largest = {name: float(abs(value).max()) for name, value in zip(read.values(), values, strict=True)}
    top = {"int8": 127.0, "fp8": 448.0}[mode]
    for node in graph.node:
        if node.name in read:
            scale = stored[makers[makers[node.input[0]].input[0]].input[1]]
            assert float(onnx.numpy_helper.to_array(scale)) * top == pytest.approx(largest[read[node.name]], rel=2e-3)


@needs_modelopt
def test_weights_are_rounded_to_the_nearest_step(
    quantised: tuple[str, QuantisedGraph], source: tuple[Member, Path]
) -> None:
    from onnx import numpy_helper

    mode, made = quantised
    graph, stored, makers = load(made.files[0])
    before, original, _ = load(source[1])
    weights = {
        node.name: numpy_helper.to_array(original[node.input[1]])
        for node in before.node
        if node.op_type == "MatMul" and node.input[1] in original
    }
    for node in graph.node:
        if node.name not in {layer.node for layer in made.quantised}:
            continue
        dequantise = makers[node.input[1]]
        scale = numpy_helper.to_array(stored[dequantise.input[1]]).astype(np.float64)
        got = numpy_helper.to_array(stored[dequantise.input[0]]).astype(np.float64) * scale
        error = abs(got - weights[node.name])
        # int8: half a step. fp8: 3 bits of mantissa, half of 2^-3 of the value, and half of its smallest step, 2^-9.
        half = 0.5 * scale if mode == "int8" else np.maximum(abs(weights[node.name]) / 16, scale * 2.0**-10)
        assert (error <= 1.01 * half + 1e-3 * abs(weights[node.name])).all(), "1e-3: scales are float16"


@needs_modelopt
def test_it_computes_what_pytorch_computes(quantised: tuple[str, QuantisedGraph], tiny_pair: TinyPair) -> None:
    import torch

    rows = inputs(11, seed=1)
    (got,) = session(quantised[1].files[0]).run(None, dict(rows))
    with torch.inference_mode():
        want = tiny_pair.model("large")(*(torch.from_numpy(values) for values in rows.values())).numpy()
    assert 1e-4 < relative_error(got, want) < 4e-2


@needs_modelopt
def test_layers_can_be_kept_and_the_rest_in_bfloat16(source: tuple[Member, Path], tmp_path: Path) -> None:
    import onnx

    made = quantise_graph(
        source[1],
        tmp_path / "q.onnx",
        member=source[0],
        mode="int8",
        calibration=CALIBRATION,
        method="entropy",
        high_precision="bf16",
        keep=["blocks.0.*", "blocks.1.mlp.fc2"],
    )
    assert [layer.name for layer in made.quantised] == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert len(made.kept) == 5
    graph, stored, _ = load(made.files[0])
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 3
    assert onnx.TensorProto.BFLOAT16 in {tensor.data_type for tensor in stored.values()}
    assert {value.type.tensor_type.elem_type for value in graph.output} == {onnx.TensorProto.FLOAT}


@needs_modelopt
def test_the_same_inputs_give_the_same_graph_and_large_weights_go_beside_it(
    quantised: tuple[str, QuantisedGraph],
    source: tuple[Member, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnx

    mode, inline = quantised
    monkeypatch.setattr("tstitch_export.quantise.layers._INLINE_LIMIT", 1000)
    made = quantise_graph(source[1], tmp_path / "q.onnx", member=source[0], mode=mode, calibration=CALIBRATION)
    assert [path.name for path in made.files] == ["q.onnx", "q.onnx_data"]
    assert set(tmp_path.iterdir()) == set(made.files)
    assert made.files[0].stat().st_size < inline.files[0].stat().st_size
    rows = dict(inputs(3, seed=2))
    (want,), (got,) = (session_at(graph.files[0]).run(None, rows) for graph in (inline, made))
    np.testing.assert_array_equal(got, want)
    models = [onnx.load(graph.files[0]) for graph in (inline, made)]
    for tensor in models[1].graph.initializer:
        tensor.ClearField("data_location")  # what is left of having been in another file
    assert models[1].SerializeToString(deterministic=True) == models[0].SerializeToString(deterministic=True)


# --- refusals


def ask(source: tuple[Member, Path], output: Path, **changes: Any) -> QuantisedGraph:
    settings: dict[str, Any] = {"mode": "int8", "calibration": CALIBRATION}
    return quantise_graph(source[1], output, **({"member": source[0]} | settings | changes))


@needs_modelopt
@pytest.mark.parametrize(
    ("changes", "kind", "message", "hint"),
    [
        ({"mode": "int9"}, UnknownName, "unknown quantisation mode 'int9'; known: int8, fp8", "int8"),
        ({"mode": "int4"}, UnknownName, "int4", "int4 is not offered"),
        ({"method": "mean"}, UnknownName, "known: max, entropy", "max"),
        ({"high_precision": "fp64"}, UnknownName, "known: fp16, bf16, fp32", "fp"),
        ({"mode": "fp8", "method": "entropy"}, BadInput, "allowed with fp8 is max", "--calibration"),
        ({"keep": ["blocks.0.atn.qkv"]}, UnknownName, "unknown layer", "'blocks.0.attn.qkv'"),
        ({"keep": ["*"]}, BadInput, "no layer left", "fewer --keep"),
        ({"calibration": {"sample": CALIBRATION["sample"]}}, BadInput, "sample, timestep", "quantise"),
        ({"calibration": {**CALIBRATION, "timestep": np.zeros(3, np.float32)}}, BadInput, "'timestep': 3", "quantise"),
    ],
)  # fmt: skip
def test_what_can_not_be_right_is_refused(
    source: tuple[Member, Path], tmp_path: Path, changes: dict[str, Any], kind: type[BadInput], message: str, hint: str
) -> None:
    with pytest.raises(kind) as error:
        ask(source, tmp_path / "q.onnx", **changes)
    assert message in error.value.message
    assert hint in error.value.hint
    assert not list(tmp_path.iterdir())


def test_a_member_in_another_precision_is_no_source(source: tuple[Member, Path]) -> None:
    for precision, words in (("bf16", "build the bundle with --precision large=fp32"), ("fp8", "quantise the bundle")):
        member = msgspec.structs.replace(source[0], precision=precision)
        with pytest.raises(BadInput, match=precision) as error:
            check_quantisable("large", member, source[1])
        assert words in error.value.hint


def test_without_modelopt(source: tuple[Member, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tstitch_export.quantise.quantise, "find_spec", lambda name: None if name == "modelopt" else find_spec(name)
    )
    with pytest.raises(Unavailable, match="nvidia-modelopt") as error:
        ask(source, tmp_path / "q.onnx")
    assert "tstitch-trt[cpu,quant]" in error.value.hint


@needs_modelopt
@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL", "free memory"),
        ("raise SystemExit('the library is broken')", "code 1: the library is broken", "report"),
        ("return Reply()", "it wrote nothing", "report"),
    ],
)
def test_the_death_of_the_worker_is_an_error_and_leaves_nothing(
    source: tuple[Member, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str, hint: str
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "another_worker.py").write_text(
        "from tstitch_engines.child import Channel\nfrom tstitch_export.quantise.worker import Reply, Request\n"
        f"def quantise(request: Request, channel: Channel) -> Reply:\n    {code}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "another_worker", raising=False)
    monkeypatch.setattr(tstitch_export.quantise.quantise, "quantise_here", import_module("another_worker").quantise)
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildFailed) as error:
        ask(source, tmp_path / "out" / "q.onnx")
    assert message in error.value.message
    assert hint in error.value.hint
    assert not list((tmp_path / "out").iterdir())
