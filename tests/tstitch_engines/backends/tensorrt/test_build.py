"""TensorRT-RTX compiles for real on a machine without a GPU; its plans are read back."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.tensorrt_builds import (
    attention_graph,
    branches_graph,
    compile_member,
    compile_request,
    hand_made,
    shipped_small,
)
from support.tiny import TinyPair
from tstitch_engines.backends.tensorrt import TensorRtBackend, backend, read_plan_header
from tstitch_engines.backends.tensorrt.attention import settle_attention
from tstitch_engines.backends.tensorrt.flavour import RTX
from tstitch_engines.backends.tensorrt.library import open_library, session
from tstitch_engines.backends.tensorrt.network import parse
from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.backends.tensorrt.worker import compile_engine
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Manifest, Member, Precision
from tstitch_engines.child import Channel
from tstitch_engines.errors import BadInput, BuildFailed, Unavailable, UnknownName
from tstitch_engines.spec import Range, TensorSpec
from tstitch_export.build import build

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")

DEFAULT_LIST = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


# --- the plan


def test_the_shipped_member_compiles_to_the_same_bytes_every_time(rtx: TensorRtBackend, tmp_path: Path) -> None:
    member, model = shipped_small()
    seen: list[tuple[str, float]] = []
    first = compile_member(
        rtx, member, model, tmp_path / "a.rtx", progress=lambda phase, share: seen.append((phase, share))
    )
    second = compile_member(rtx, member, model, tmp_path / "b.rtx")
    assert hash_file(first) == hash_file(second)
    header = read_plan_header(first)
    assert header is not None
    assert (header.version, header.size) == (rtx.version(), first.stat().st_size)
    assert (header.capabilities, header.later) == (DEFAULT_LIST, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.rtx", "b.rtx"]
    phases, shares = {phase for phase, _ in seen}, [share for _, share in seen]
    assert {"building engine", "optimizing graph"} <= phases
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.3
    assert 0.8 < shares[-1] <= 1


@pytest.mark.parametrize(("precision", "fused"), [("fp32", 0), ("fp16", 1), ("bf16", 1)])
def test_the_tiny_dit_in_every_precision(
    tiny_pair: TinyPair, tmp_path: Path, precision: Precision, fused: int, rtx: TensorRtBackend
) -> None:
    """In half precision its attention (2 heads of 16) must be a fused kernel; the shipped way, in float32, has none."""
    output = tmp_path / "tiny.bundle"
    manifest = build(
        tiny_pair.recipe("small"),
        members={"small": tiny_pair.checkpoint("small")},
        output=output,
        backend="tensorrt-rtx",
        precision=precision,
        profile=Range(1, 2, 4),
        options={"compute-capabilities": "8.9,8.6"},
    )
    member = manifest.members["small"]
    (record,) = member.engines
    assert (record.identity.arch, record.identity.precision) == ("sm_86,sm_89", precision)
    note = record.notes.get("attention", "")
    assert note.startswith(f"{fused} fused") if fused else note == ""
    header = read_plan_header(output / record.files[0].path)
    assert header is not None
    assert header.capabilities == ((8, 6), (8, 9))
    library = open_library(RTX)
    with session(RTX, library) as opened:
        kept = parse(opened, output / member.onnx[0].path, "dit", (member.inputs, member.outputs))
        assert settle_attention(opened, kept[1], BuildOptions()).fused == fused


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_at_opset_22_is_fused_as_well(tiny_pair: TinyPair, tmp_path: Path, precision: Precision) -> None:
    output, kernels, sums = tmp_path / "tiny.bundle", {}, []
    for options in ({"opset": 22}, {"opset": 23}, {"attention": "apart"}):
        manifest = build(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            output=output,
            backend="tensorrt-rtx",
            precision=precision,
            profile=Range(1, 2, 4),
            options={"compute-capabilities": "8.9", **options},
        )
        (record,) = manifest.members["small"].engines
        plan = (output / record.files[0].path).read_bytes()
        sums.append({found.decode() for found in re.findall(rb"fmha::Ampere_hmma_(\w+)_traits", plan)})
        kernels[record.notes["attention"]] = len(set(re.findall(rb"_gemm_mha_v2_0x\w+", plan)))
    widened = ", 1 of them with sums in float32" if precision == "fp16" else ""
    assert kernels == {"1 left to the builder": 1, f"1 fused{widened}": 1, "1 kept apart": 0}
    assert sums == ([{"fp16"}, {"fp32"}, set()] if precision == "fp16" else [{"bf16"}, {"bf16"}, set()])
    assert any("opset 22: with attention=apart attention has to be products" in note for note in manifest.notes)


@pytest.mark.parametrize(("dtype", "head", "fused"), [("float16", 64, 1), ("float16", 8, 0), ("float32", 64, 0)])
def test_attention_is_fused_where_there_is_a_kernel_and_taken_apart_elsewhere(
    rtx: TensorRtBackend, tmp_path: Path, dtype: str, head: int, fused: int
) -> None:
    model = tmp_path / "attention.onnx"
    member = attention_graph(model, dtype=dtype, head=head)
    library = open_library(RTX)
    with session(RTX, library) as opened:
        kept = parse(opened, model, "dit", (member.inputs, member.outputs))
        assert settle_attention(opened, kept[1], BuildOptions()).fused == fused
    assert compile_member(rtx, member, model, tmp_path / "attention.rtx").stat().st_size > 10_000


# --- reuse


def test_nothing_is_compiled_twice(tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = backend.run_in_child

    def counting(function: Any, request: Any, *rest: Any, **options: Any) -> Any:
        compiled.append(request.family)
        return real(function, request, *rest, **options)

    monkeypatch.setattr(backend, "run_in_child", counting)

    def make(name: str, large: str) -> Manifest:
        return build(
            tiny_pair.recipe("small", "large"),
            members={"small": tiny_pair.checkpoint("small"), "large": tiny_pair.checkpoint(large)},
            output=tmp_path / name,
            backend="tensorrt-rtx",
            profile=Range(1, 1, 3),
        )

    first = make("first.bundle", "large")
    assert len(compiled) == 2
    assert make("second.bundle", "large") == first
    assert len(compiled) == 2
    open_bundle(tmp_path / "second.bundle")
    # Another large member: only that one is compiled again.
    state = tiny_pair.checkpoint("large").read_bytes()
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(state[:-4] + np.float32(0.25).tobytes())
    third = build(
        tiny_pair.recipe("small", "large"),
        members={"small": tiny_pair.checkpoint("small"), "large": changed},
        output=tmp_path / "third.bundle",
        backend="tensorrt-rtx",
        profile=Range(1, 1, 3),
    )
    assert len(compiled) == 3
    assert third.members["small"].engines == first.members["small"].engines
    assert third.members["large"].engines != first.members["large"].engines


# --- options


def test_options_change_the_plan(rtx: TensorRtBackend, tmp_path: Path) -> None:
    member, model = shipped_small()
    one = compile_member(rtx, member, model, tmp_path / "1.rtx", options={"compute-capabilities": "12.0"})
    limited = compile_member(
        rtx, member, model, tmp_path / "2.rtx", options={"compute-capabilities": "12.0", "workspace": 64}
    )
    headers = [read_plan_header(path) for path in (one, limited)]
    assert [header.gpus() if header else None for header in headers] == ["12.0", "12.0"]
    assert hash_file(one) != hash_file(limited)


def test_streams_besides_the_callers_are_none_unless_asked_for(rtx: TensorRtBackend, tmp_path: Path) -> None:
    """What may run side by side does by the library's default, with waits between the streams in every block."""
    member = branches_graph(tmp_path / "branches.onnx")

    def plan(**options: Any) -> tuple[str, int]:
        named = {"compute-capabilities": "8.9", **{name.replace("_", "-"): value for name, value in options.items()}}
        model, batch = tmp_path / "branches.onnx", Range(1, 8, 16)
        path = compile_member(rtx, member, model, tmp_path / "a.rtx", options=named, batch=batch)
        return hash_file(path)

    assert plan() == plan(max_aux_streams=0) != plan(max_aux_streams=1)


def test_options_that_are_refused_change_nothing(tmp_path: Path) -> None:
    member, model = branches_graph(tmp_path / "branches.onnx"), tmp_path / "branches.onnx"
    plans = set()
    for changed in ({}, {"optimisation_level": 0}, {"optimisation_level": 5}, {"tiling": "FULL"}):
        options = BuildOptions(capabilities=(89,), max_aux_streams=1, **changed)
        request = compile_request(member, model, tmp_path / "a.rtx", options=options, batch=Range(1, 8, 16))
        compile_engine(request, Channel(io.BytesIO()))
        plans.add(hash_file(tmp_path / "a.rtx"))
    assert len(plans) == 1
    assert {"optimisation-level", "tiling"} <= RTX.refused.keys()


def test_weight_streaming_says_what_it_costs(
    rtx: TensorRtBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    member, model = shipped_small()
    compile_member(rtx, member, model, tmp_path / "a.rtx", options={"weight-streaming": True})
    assert "can't be captured" in caplog.text


@pytest.mark.parametrize(
    ("options", "kind", "words", "hint"),
    [
        ({"optimisation-level": 5}, BadInput, "can't honour the option optimisation-level=5", "leave out"),
        ({"tiling": "full"}, BadInput, "same plan, byte for byte", "leave out"),
        (
            {"max-aux-streams": 65},
            BadInput,
            "max-aux-streams is 65; allowed is a whole number from 0 to 64",
            "write it",
        ),
        ({"timing-cache": "x"}, BadInput, "times no kernels", "leave out"),
        ({"hardware-compatible": "ampere+"}, BadInput, "every GPU in its list", "leave out"),
        ({"version-compatible": True}, BadInput, "exactly one version", "leave out"),
        ({"refit": True}, BadInput, "only on a GPU and for exactly one.*--device cpu", "--device cuda"),
        ({"strip-weights": True, "compute-capabilities": "8.6"}, BadInput, "strip-weights only on a GPU", "leave out"),
        ({"refit": True, "compute-capabilities": "8.6,8.9"}, BadInput, "2 compute capabilities", "--device cuda"),
        ({"compute-capabilities": "9.0"}, UnknownName, "'9.0'; known: 7.5, 8.0, 8.6, 8.9, 12.0", "did you mean"),
        ({"compute-capabilities": ""}, UnknownName, "unknown compute capability", "commas"),
        ({"workspace": 0}, BadInput, "workspace is 0; allowed is a whole number from 1", "--option workspace"),
        ({"worskpace": 64}, UnknownName, "worskpace", "did you mean 'workspace'"),
    ],
)
def test_an_option_that_can_t_be_honoured_is_an_error(
    rtx: TensorRtBackend, options: dict[str, Any], kind: type[BadInput], words: str, hint: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        rtx.build_arch("cpu", options)
    assert hint in caught.value.hint


def test_a_gpu_that_can_t_do_the_arithmetic_is_named(rtx: TensorRtBackend, tmp_path: Path) -> None:
    member, model = shipped_small()
    with pytest.raises(BuildFailed, match="FP32 GEMM is not supported") as caught:
        compile_member(rtx, member, model, tmp_path / "a.rtx", options={"compute-capabilities": "7.5,8.6"})
    assert "leave 7.5 out" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_is_too_small(rtx: TensorRtBackend, tmp_path: Path) -> None:
    member, model = shipped_small()
    with pytest.raises(BuildFailed, match="workspace") as caught:
        compile_member(rtx, member, model, tmp_path / "a.rtx", options={"workspace": 1})
    assert "raise --option workspace=1" in caught.value.hint


def test_for_a_gpu_that_is_not_there(rtx: TensorRtBackend) -> None:
    with pytest.raises(Unavailable, match="cuda:7"):
        rtx.build_arch("cuda:7", {})


def test_the_architecture_of_an_identity(rtx: TensorRtBackend) -> None:
    assert rtx.build_arch("cpu", {}) == "rtx-default"
    assert rtx.build_arch("cpu", {"compute-capabilities": "12.0, 8.6,8.6"}) == "sm_86,sm_120"


def test_memory_is_estimated_and_a_lack_of_it_said_before(
    rtx: TensorRtBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, model = shipped_small()
    monkeypatch.setattr(backend, "free_memory", lambda: 100 << 20)
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO, "tstitch_engines"):
        compile_member(rtx, member, model, tmp_path / "a.rtx")
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    want = "needs about 1.0 GiB of memory and 3 s (by the size of the ONNX) and only 0.1 GiB are free"
    assert any(want in r.getMessage() for r in said)
    assert "compiled small.onnx" in caplog.text


# --- graphs that can't be compiled


def pair(shape: tuple[int | str, ...] = ("B", 4)) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(name="x", dtype="float32", shape=shape), TensorSpec(name="y", dtype="float32", shape=shape)


def test_an_unsupported_operator_is_named_with_what_helps(rtx: TensorRtBackend, tmp_path: Path) -> None:
    from onnx import helper

    x, y = pair(("B", 4))
    nodes = [
        helper.make_node("SequenceConstruct", ["x"], ["list"], name="gather_them"),
        helper.make_node("ConcatFromSequence", ["list"], ["y"], axis=0),
    ]
    model = tmp_path / "sequence.onnx"
    member = hand_made(model, nodes, [x], [y])
    with pytest.raises(BuildFailed, match=r"can't import sequence.onnx \(family dit\).*SequenceConstruct") as caught:
        compile_member(rtx, member, model, tmp_path / "a.rtx")
    assert "optimize=True" in caught.value.hint


def fixed_inside(model: Path, shape: list[int]) -> Member:
    """A graph that reshapes ``x [B, 4]`` to ``shape`` and back."""
    from onnx import TensorProto, helper

    x, y = pair(("B", 4))
    nodes = [helper.make_node("Reshape", ["x", "there"], ["r"]), helper.make_node("Reshape", ["r", "back"], ["y"])]
    constants = [
        helper.make_tensor("there", TensorProto.INT64, [len(shape)], shape),
        helper.make_tensor("back", TensorProto.INT64, [2], [-1, 4]),
    ]
    return hand_made(model, nodes, [x], [y], constants=constants)


def test_a_dimension_fixed_inside_is_an_error(rtx: TensorRtBackend, tmp_path: Path) -> None:
    model = tmp_path / "fixed.onnx"
    member = fixed_inside(model, [2, 4])
    with pytest.raises(BuildFailed, match=r"has the outputs .*\(2, 4\).*wanted are .*\(-1, 4\)") as caught:
        compile_member(rtx, member, model, tmp_path / "a.rtx")
    assert "export the member again" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.onnx"]


def test_the_library_s_warning_of_a_profile_it_can_t_keep_is_fatal(rtx: TensorRtBackend, tmp_path: Path) -> None:
    """The library only warns, and makes an engine that runs at one size."""
    from onnx import TensorProto, helper

    x, y = pair(("B", 4))
    nodes = [
        helper.make_node("Reshape", ["x", "fixed"], ["r"]),
        helper.make_node("ReduceSum", ["r"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    model = tmp_path / "warned.onnx"
    member = hand_made(model, nodes, [x], [y], constants=[helper.make_tensor("fixed", TensorProto.INT64, [2], [2, 4])])
    with pytest.raises(BuildFailed, match=r"fixes a dimension inside that is dynamic outside: .*self-consistent"):
        compile_member(rtx, member, model, tmp_path / "a.rtx")
    assert [path.name for path in tmp_path.iterdir()] == ["warned.onnx"]


def test_other_tensors_than_the_member_s(rtx: TensorRtBackend, tmp_path: Path) -> None:
    from onnx import helper

    x, y = pair()
    model = tmp_path / "other.onnx"
    hand_made(model, [helper.make_node("Relu", ["x"], ["y"])], [x], [y])
    member, _ = shipped_small()
    with pytest.raises(BuildFailed, match=r"other.onnx has the inputs .*'x'.*wanted are .*'sample'"):
        compile_member(rtx, member, model, tmp_path / "a.rtx")
