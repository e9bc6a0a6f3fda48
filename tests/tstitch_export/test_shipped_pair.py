"""The built-in pair is built in every precision where neither torch nor onnx can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tstitch_engines.bundle.bundle import open_bundle
from tstitch_export.families import open_family
from tstitch_export.families.base import TORCH_NAMES
from tstitch_export.onnx_export.graph import retyped_to_float32
from tstitch_export.planning.recipe import load_recipe
from tstitch_export.planning.shipped import read_shipped

SCRIPT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'onnx', 'onnxscript', 'diffusers', 'safetensors', 'ml_dtypes'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from tstitch_trt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def build(backend: str, precision: str, output: Path) -> subprocess.CompletedProcess[str]:
    args = ["build", "fashion", "--backend", backend, "--precision", precision, "--batch", "1:2:2", "-o", str(output)]
    return subprocess.run([sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("onnxruntime", "fp16"),
        pytest.param("tensorrt-rtx", "fp16", marks=pytest.mark.slow),
        pytest.param("tensorrt-rtx", "bf16", marks=pytest.mark.slow),
        pytest.param("onnxruntime", "large=fp16", marks=pytest.mark.slow),
    ],
)
def test_half_precision_needs_no_torch(backend: str, precision: str, tmp_path: Path) -> None:
    if backend == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    done = build(backend, precision, tmp_path / "half.bundle")
    assert done.returncode == 0, done.stderr
    members = open_bundle(tmp_path / "half.bundle").manifest.members
    wanted = {"small": "fp32", "large": "fp16"} if "=" in precision else dict.fromkeys(members, precision)
    assert {name: member.precision for name, member in members.items()} == wanted
    for member in members.values():
        assert [record.identity.backend for record in member.engines] == [backend]


def test_bfloat16_on_the_cpu_is_refused_by_name(tmp_path: Path) -> None:
    done = build("onnxruntime", "bf16", tmp_path / "half.bundle")
    assert done.returncode == 1
    assert "the CPU provider has no bfloat16 kernels" in done.stderr
    assert "torch" not in done.stderr


@pytest.mark.parametrize("precision", TORCH_NAMES)
@pytest.mark.parametrize("name", ["small", "large"])
def test_the_shipped_graphs_are_pytorch_s_model_in_their_precision(name: str, precision: str, tmp_path: Path) -> None:
    """fp16: beside PyTorch's own float16. bf16, for which the CPU has no kernels: the graph widened to float32."""
    recipe, base = load_recipe("fashion")
    member = recipe.members[name]
    record = base / member.shipped[precision]  # type: ignore[index]  # one of the precisions
    graph = record.parent / read_shipped(record).member.onnx[0].path
    family = open_family(member.family)
    model: Any = family.load(family.inspect(base / str(member.checkpoint), member.options))
    kind = getattr(torch, TORCH_NAMES[precision])  # type: ignore[index]
    run_in = torch.float32 if precision == "bf16" else kind
    model = model.to(kind).to(run_in)
    if precision == "bf16":
        retyped_to_float32(graph, tmp_path / "wide.onnx")
        graph = tmp_path / "wide.onnx"
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    x, t, y = torch.randn(3, 1, 28, 28).to(kind).to(run_in), torch.tensor([999.0, 500.0, 3.0]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        want = model(x, t, y).float().numpy()
    got = session.run(None, {"sample": x.numpy(), "timestep": t.numpy(), "labels": y.numpy()})[0].astype(np.float32)
    limit = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 1e-2}[precision]
    assert np.abs(got - want).max() <= limit * np.abs(want).max()
