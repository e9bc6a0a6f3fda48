"""TensorRT-RTX compiles every family for real on a machine without a GPU, and the plan's header is read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.exports import graph_of, network_plan, onnx_of
from support.rtx_families import CHECKPOINTS
from tstitch_engines.backends.tensorrt import TensorRtBackend, read_plan_header
from tstitch_engines.backends.tensorrt.attention import settle_attention
from tstitch_engines.backends.tensorrt.flavour import RTX
from tstitch_engines.backends.tensorrt.library import open_library, session
from tstitch_engines.backends.tensorrt.network import parse
from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.compile.bundle import recompile
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.families import FAMILIES, open_family

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")


def header_of(path: Path, rtx: TensorRtBackend) -> tuple[tuple[int, int], ...]:
    """The capabilities the plan is for; its version and size are as they must be."""
    header = read_plan_header(path)
    assert header is not None
    assert (header.version, header.size) == (rtx.version(), path.stat().st_size)
    return header.capabilities


def test_every_family_has_a_checkpoint_to_compile() -> None:
    assert not FAMILIES.keys() - CHECKPOINTS.keys(), "give each a tiny checkpoint in tests/support/rtx_families.py"


CASES = [
    pytest.param(family, layout, id=f"{family}-{layout}", marks=[pytest.mark.slow] if index else [])
    for family in FAMILIES
    for index, layout in enumerate(CHECKPOINTS.get(family, {}))
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_tiny_network_of_every_family(name: str, layout: str, rtx: TensorRtBackend, tmp_path: Path) -> None:
    """In half precision, where attention must be a fused kernel; VAEs as they are built, in float32."""
    family = open_family(name)
    given = CHECKPOINTS[name][layout](tmp_path)
    plan = network_plan(name, given.path, given.options, "fp32" if family.role.startswith("vae") else "fp16")
    network = onnx_of(plan, tmp_path / "export")
    graph = graph_of(network, tmp_path / "export")
    dims = {"B": Range(1, 2, 4)}
    for dim, known in family.dims(plan.inspection).items():  # dynamic ones are to stay dynamic
        dims[dim] = Range(known.native, known.native, known.native + known.multiple)
    seen: list[str] = []
    (engine,) = rtx.compile(
        member=network,
        model=graph,
        profile=ShapeProfile(dims),
        device="cpu",
        options={"compute-capabilities": "8.9,12.0"},
        output=tmp_path / "plan.rtx",
        progress=lambda phase, share: seen.append(phase),
    )
    assert header_of(engine, rtx) == ((8, 9), (12, 0))
    assert "building engine" in seen
    library = open_library(RTX)
    with session(RTX, library) as opened:
        kept = parse(opened, graph, name, (network.inputs, network.outputs))
        attention = _attention_nodes(graph)
        assert settle_attention(opened, kept[1], BuildOptions()).fused == attention
        assert kept[1].num_inputs == len(network.inputs)
    assert attention or family.role.startswith("vae") or family.role == "controlnet"


def _attention_nodes(path: Path) -> int:
    import onnx

    return sum(node.op_type == "Attention" for node in onnx.load(path, load_external_data=False).graph.node)


def test_the_built_in_pair(rtx: TensorRtBackend, fashion_bundle: Path, tmp_path: Path) -> None:
    """Both members, for the library's own list of GPUs."""
    bundle = recompile(open_bundle(fashion_bundle), backend="tensorrt-rtx", output=tmp_path / "rtx.bundle")
    for member in bundle.manifest.members.values():
        (record,) = (record for record in member.engines if record.identity.backend == "tensorrt-rtx")
        assert record.identity.arch == "rtx-default"
        assert header_of(bundle.path(record.files[0]), rtx) == ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
    open_bundle(bundle.root)
