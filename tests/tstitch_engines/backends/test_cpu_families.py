"""Every family on the backends that run without a GPU: their engines give what its module in PyTorch does.

TensorRT-RTX, which only compiles there, is in ``test_tensorrt_families.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.exports import graph_of, network_plan, onnx_of, program_of
from support.rtx_families import CHECKPOINTS
from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity
from tstitch_engines.device.open import open_device
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.families import FAMILIES, open_family
from tstitch_trt.runtime.component import Component

# TorchInductor takes most of the time: always with a DiT and a UNet, with the other families in the slow tests.
INDUCTOR = ("dit", "unet-sd")
CASES = [
    pytest.param(name, backend, marks=pytest.mark.slow if backend == "torch" and name not in INDUCTOR else ())
    for name in FAMILIES
    for backend in ("onnxruntime", "torch")
]


@pytest.mark.parametrize(("name", "opened"), CASES)
def test_engines_equal_the_module(name: str, opened: str, tmp_path: Path) -> None:
    """With other sizes than the native ones, where they may vary."""
    import torch

    family = open_family(name)
    given = next(iter(CHECKPOINTS[name].values()))(tmp_path)
    plan = network_plan(name, given.path, given.options)
    inspection = plan.inspection
    sizes = {key: dim.native + dim.multiple for key, dim in family.dims(inspection).items()}
    inputs = family.example(inspection, batch=3, seed=5, sizes=sizes or None)
    with torch.no_grad():
        found = family.load(inspection)(*inputs)
    want = [tensor.numpy() for tensor in ((found,) if isinstance(found, torch.Tensor) else found)]
    network = onnx_of(plan, tmp_path / "export")
    profile = ShapeProfile({"B": Range(1, 2, 4), **{key: Range(size, size, size) for key, size in sizes.items()}})
    arrays = {spec.name: value.numpy() for spec, value in zip(network.inputs, inputs, strict=True)}
    backend = open_backend(opened)
    (path,) = backend.compile(
        member=network,
        model=graph_of(network, tmp_path / "export") if backend.model_kind == "onnx" else program_of(plan),
        profile=profile,
        device="cpu",
        options={},
        output=tmp_path / f"engine{backend.engine_suffix}",
        progress=silent,
    )
    identity = EngineIdentity(
        schema=SCHEMA,
        backend=backend.name,
        backend_version=backend.version(),
        onnx_sha256="",
        precision="fp32",
        profile=profile,
        arch=backend.arch("cpu"),
    )
    device = open_device("cpu")
    part = Component(
        name, network, backend.load(path, member=network, identity=identity, device=device, threads=1), device
    )
    got = part(arrays, sizes)
    for spec, wanted in zip(network.outputs, want, strict=True):
        assert got[spec.name].shape == wanted.shape
        assert np.abs(got[spec.name] - wanted).max() <= 1e-4 * np.abs(wanted).max(), f"{backend.name} {spec.name}"
    part.close()
