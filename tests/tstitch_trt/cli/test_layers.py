"""``inspect --layers`` and ``verify --layers``: what the compiler made of a bundle's networks."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from support.command import Command, refused
from support.tensorrt_stand import Place, Stand, opened
from support.tiny import TinyPair
from tstitch_engines.backends.tensorrt.flavour import TENSORRT
from tstitch_engines.backends.tensorrt.layers import Layer, LayerTensor, PlanLayers, layers_file, write_layers
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.bundle.manifest import EngineRecord
from tstitch_engines.errors import BadEngine
from tstitch_trt.cli._layers import print_layers
from tstitch_trt.cli.inspect import _print_layers
from tstitch_trt.verify.plan_layers import LayerList, list_layers

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def copy(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pair.alone("small"), tmp_path / "copy.bundle"))


def test_a_bundle_without_compiled_layers_says_what_to_build(run: Command, copy: Path) -> None:
    refused(
        run("inspect", copy, "--layers"),
        "has no engine of tensorrt or tensorrt-rtx",
        "--backend tensorrt-rtx --profiling-verbosity detailed",
    )


@needs_rtx
def test_layers_are_shown_of_engines_that_were_built_with_them(run: Command, copy: Path) -> None:
    line = ("build", copy, "--backend", "tensorrt-rtx", "--option", "compute-capabilities=8.9")
    assert run(*line).code == 0
    refused(
        run("inspect", copy, "--layers"),
        "profiling verbosity the library's own: its layers were not listed",
        f"tstitch-trt build {copy} --backend tensorrt-rtx --device cpu --profiling-verbosity detailed; or on a GPU",
    )
    assert run(*line, "--profiling-verbosity", "detailed").code == 0

    shown = run("inspect", copy, "--layers")
    assert shown.code == 0, shown.err
    assert shown.out.startswith("member small: tensorrt-rtx")
    assert "by the build log of TensorRT-RTX" in shown.out
    assert "  products   " in shown.out
    assert "gemm         fp32" in shown.out
    assert "sha256" not in shown.out, "the rest of the bundle is not shown"

    cpu, rtx = run("inspect", copy, "--layers", "--json").json["members"]["small"]["engines"]
    assert "layers" not in cpu
    assert rtx["no_layers"] is None
    summary, layers = rtx["layers"]["summary"], rtx["layers"]["layers"]
    assert summary["count"] == len(layers) == sum(summary["kinds"].values())
    assert summary["products"]["fp32"] == sum(layer["kind"] == "gemm" for layer in layers)
    assert rtx["layers"]["suspicious"] == []

    checked = run("verify", copy, "--layers", "--samples", "1", "--device", "cpu")
    assert checked.code == 0, checked.err
    assert "compiled layers of member small" in checked.out
    assert "none differs" in checked.out, "and the graph of the other engine is compared, layer by layer"
    told = run("verify", copy, "--layers", "--samples", "1", "--device", "cpu", "--json").json["engines"]
    assert [engine["layers"] is None for engine in told] == [True, False]
    assert told[1]["layers"]["summary"] == summary
    assert [engine["layers"] for engine in run("verify", copy, "--samples", "1", "--json").json["engines"]] == [
        None
    ] * 2


# --- a TensorRT plan, which is compiled and loaded on a GPU only


def tensorrt_bundle(copy: Path) -> tuple[Bundle, EngineRecord]:
    """The bundle with its engine as one of TensorRT's, with a list of one layer beside it."""
    bundle = open_bundle(copy)
    (record,) = bundle.manifest.members["small"].engines
    plan = bundle.path(record.files[0])
    layers = (Layer(name="_gemm_mha_v2_myl0_1", type="kgen"), Layer(name="a\x1b[2J", type="SoftMaxV2"))
    write_layers(plan, PlanLayers(source="engine inspector", library="TensorRT 10.13", layers=layers))
    beside = msgspec.structs.replace(record.files[0], path=f"{record.files[0].path}.layers.json")
    assert bundle.path(beside) == layers_file(plan)
    identity = msgspec.structs.replace(record.identity, backend="tensorrt", precision="fp16")
    return bundle, msgspec.structs.replace(record, files=(*record.files, beside), identity=identity)


def test_a_loaded_plan_tells_its_layers_itself(copy: Path, tmp_path: Path) -> None:
    bundle, record = tensorrt_bundle(copy)
    kept = list_layers(bundle, record)
    assert isinstance(kept, LayerList)
    assert [layer.kind for layer in kept.layers] == ["attention", "softmax"]

    stand = Stand(TENSORRT)
    stand.information = '{"Layers": ["Reformatting CopyNode", "__myl_ReshTran_myl0_1"]}'
    engine = opened(stand, Place(), tmp_path, TENSORRT)
    told = list_layers(bundle, record, engine)
    assert isinstance(told, LayerList)
    assert [layer.kind for layer in told.layers] == ["unknown", "copy"]
    stand.information = ""
    assert "tells no layers of the engine small.plan" in str(list_layers(bundle, record, engine))
    identity = msgspec.structs.replace(record.identity, options={"profiling-verbosity": "none"})
    bare = msgspec.structs.replace(record, files=record.files[:1], identity=identity)
    assert "verbosity none: its layers were not listed" in str(list_layers(bundle, bare))


def test_layers_are_those_of_a_plan_for_one_gpu_model(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, record = tensorrt_bundle(copy)
    identity = msgspec.structs.replace(record.identity, arch="sm_90", gpu="NVIDIA H200")
    small = bundle.manifest.members["small"]
    members = {"small": msgspec.structs.replace(small, engines=(msgspec.structs.replace(record, identity=identity),))}
    changed = Bundle(bundle.root, msgspec.structs.replace(bundle.manifest, members=members))
    _print_layers(changed, {record.files[0].path: "none"})
    assert "for sm_90 (NVIDIA H200), fp16" in capsys.readouterr().out


def test_a_damaged_list_says_the_command_that_makes_it_anew(copy: Path) -> None:
    bundle, record = tensorrt_bundle(copy)
    layers_file(bundle.path(record.files[0])).write_text("{")
    with pytest.raises(BadEngine) as caught:
        list_layers(bundle, record)
    wanted = f"tstitch-trt build {bundle.root} --backend tensorrt --device cuda --profiling-verbosity detailed --fresh"
    assert caught.value.hint == f"compile the engine again: {wanted}"


def test_a_list_of_any_size_is_shown_in_bounds(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, record = tensorrt_bundle(copy)
    tensors = tuple(LayerTensor("", "fp16") for _ in range(3))
    layer = Layer(name="a" * 100_000, type="kgen", inputs=(*tensors, LayerTensor("", "int8", (2,))))
    write_layers(
        bundle.path(record.files[0]), PlanLayers(source="build log", library="b" * 100_000, layers=(layer,) * 100)
    )
    print_layers("member small", list_layers(bundle, record))
    said = capsys.readouterr().out
    assert len(said) < 100_000
    assert "3xfp16[] int8[2]" in said


def test_what_is_suspicious_is_said_first(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_layers("member small", list_layers(*tensorrt_bundle(copy)))
    said = capsys.readouterr().out
    assert "  suspicious attention is not fused in 1 places" in said
    assert said.index("suspicious") < said.index("_gemm_mha_v2")
    assert "a?[2J" in said
    assert "\x1b" not in said, "a name from a file is no command to the terminal"
    print_layers("member small", "it was compiled without")
    assert capsys.readouterr().out == "member small\n  no layers  it was compiled without\n"
