"""The map of weights finds each one in the graph, whatever the exporter made of its name and layout."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tstitch_engines.bundle.weights import WeightMap, Weights
from tstitch_engines.quiet import silence_output
from tstitch_export.families.base import LoraTarget
from tstitch_export.onnx_export.weight_map import write_weight_map


class Net(torch.nn.Module):
    """A convolution, square and other linear layers, two with the same values, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.square = torch.nn.Linear(8, 8)
        self.wide = torch.nn.Linear(8, 12)
        self.zero = torch.nn.Linear(12, 5, bias=False)
        self.other = torch.nn.Linear(12, 5, bias=False)
        self.norm = torch.nn.LayerNorm(12)
        self.unused = torch.nn.Linear(4, 4)
        with torch.no_grad():
            self.zero.weight.zero_()
            self.other.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.wide(torch.relu(self.square(self.conv(x).flatten(2).transpose(1, 2)))))
        return self.zero(y) + self.other(y + 1)


@pytest.mark.parametrize(("dtype", "external"), [("float32", False), ("float16", True), ("bfloat16", True)])
def test_every_weight_is_found(dtype: str, external: bool, tmp_path: Path) -> None:
    net = Net().eval().to(getattr(torch, dtype))
    wrapped = torch.nn.Sequential(net)
    graph = tmp_path / "model.onnx"
    with silence_output(), torch.no_grad():
        example = (torch.randn(2, 3, 4, 4).to(getattr(torch, dtype)),)
        exported = torch.onnx.export(wrapped, example, dynamo=True, opset_version=22, verbose=False)
        exported.save(graph, external_data=external)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} | {"gone.weight": (2, 2)}
    target = LoraTarget(part="unet", shapes=shapes, aliases={"renamed": "square"}, prefix="0.")
    write_weight_map(graph, wrapped, target, tmp_path / "weights.json")
    found = msgspec.json.decode((tmp_path / "weights.json").read_bytes(), type=WeightMap)
    assert (found.part, found.aliases) == ("unet", {"renamed": "square"})
    stored = Weights(found, {path.name: path for path in tmp_path.glob("model.onnx*")})
    bits = {4: torch.int32, 2: torch.int16}
    for name in ("conv", "square", "wide"):
        weight = found.weights[f"{name}.weight"]
        assert weight.parameter == f"0.{name}.weight"
        assert weight.initialiser is not None
        assert not weight.shared
        values = stored.read(weight.initialiser)
        want = net.get_parameter(f"{name}.weight").detach()
        want = want.contiguous().view(bits[want.element_size()]).numpy()
        assert np.array_equal((values.T if weight.transposed else values).view(want.dtype), want)
    assert found.weights["wide.weight"].transposed
    assert not found.weights["conv.weight"].transposed
    # Equal weights are one initialiser, or can't be told apart: they may be read and not replaced.
    for name in ("zero", "other"):
        weight = found.weights[f"{name}.weight"]
        assert weight.initialiser is None or weight.shared
    assert found.weights["unused.weight"].initialiser is None
    assert found.weights["gone.weight"].parameter is None
    assert "norm.weight" not in found.weights
