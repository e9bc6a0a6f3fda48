"""What engines compute on a GPU against ONNX Runtime on the CPU, in every precision. Not run on a GPU yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.manifest import Precision
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import Unavailable
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_trt.verify.plan_layers import LayerList, list_layers
from tstitch_trt.verify.verify import LIMITS, Verification, verify

pytestmark = pytest.mark.gpu

BACKENDS = (
    "onnxruntime",
    "onnxruntime+provider=tensorrt",
    "torch",
    "torch+compile=default",
    "tensorrt",
    "tensorrt-rtx",
)


def checked(pair: TinyPair, backend: str, precision: Precision, device: str, output: Path) -> Verification:
    """Both members, compiled for ``device`` and run there at several batches on random and real inputs."""
    name, _, option = backend.partition("+")
    key, _, value = option.partition("=")
    build(
        pair.recipe("small", "large"),
        members={member: pair.checkpoint(member) for member in ("small", "large")},
        output=output,
        backend=name,
        options={key: value} if option else {},
        precision=precision,
        device=device,
        profile=Range(1, 4, 8),
    )
    return verify(output, device=device)


def equal(found: Verification, precision: Precision) -> None:
    """Within the limits of ``verify``, whose reasons stand there: 1e-4 in float32, in which no backend uses TF32."""
    limit, reason = LIMITS[precision]
    assert limit <= {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1e-1}[precision], reason
    assert [(check.member, check.status, check.reason) for check in found.engines] == [
        ("small", "passed", None),
        ("large", "passed", None),
    ]
    for check in found.engines:
        ours = [c for c in check.comparisons if c.against == "onnxruntime"]
        assert {(c.inputs, c.batch) for c in ours} == {(k, b) for k in ("random", "trajectory") for b in (1, 4, 8)}
        assert all(c.error.within(limit) for c in ours)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_equal_onnx_runtime(tiny_pair: TinyPair, tmp_path: Path, backend: str, precision: Precision) -> None:
    try:
        open_device("cuda")
        found = checked(tiny_pair, backend, precision, "cuda", tmp_path / "x.bundle")
    except Unavailable as error:
        pytest.skip(error.message)
    equal(found, precision)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_loaded_plan_tells_the_layers_that_its_build_listed(
    backend: str, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    output = tmp_path / "layers.bundle"
    try:
        open_device("cuda")
        build(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            output=output,
            backend=backend,
            options={"profiling-verbosity": "detailed"},
            precision="bf16",
            device="cuda",
            profile=Range(1, 4, 8),
        )
    except Unavailable as error:
        pytest.skip(error.message)
    (record,) = open_bundle(output).manifest.members["small"].engines
    kept = list_layers(open_bundle(output), record)
    (check,) = verify(output, layers=True, samples=1, trust=True).engines
    told = check.layers
    assert isinstance(kept, LayerList)
    assert isinstance(told, LayerList)
    assert told.source == "engine inspector"
    assert told.summary.products == kept.summary.products
    assert told.summary.attention == kept.summary.attention
    assert {layer.precision for layer in told.layers if layer.kind == "gemm"} == {"bf16"}
