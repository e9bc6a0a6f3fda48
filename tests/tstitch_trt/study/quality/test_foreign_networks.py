"""Networks for metrics, from strangers: endless, huge or broken ones are errors in time, and nothing is left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from support import hand_made
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Decoder, Quality
from tstitch_engines.child import Limits, end_children
from tstitch_engines.errors import BadInput, OutOfMemory, OutOfTime, Untrusted
from tstitch_trt.study.quality.network import FeatureNetwork
from tstitch_trt.study.quality.scorer import Scorer

IMAGES = np.zeros((2, 6, 4, 3), np.uint8)
SOON = Limits(time=2.0)  # with the start of PyTorch


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    end_children()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        for pid in (task / "children").read_text().split():
            assert b"tstitch_engines.child" not in Path(f"/proc/{pid}/cmdline").read_bytes()


class Endless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() < 1e30):
            x = x * 0
        return x


class EndlessToLoad(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> int:
        return 1

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        self.training = False
        while state > 0:
            state = 1


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.factor).mean((2, 3))


class Growing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [x]
        while len(kept) > 0:
            kept.append(torch.ones(4_000_000) * len(kept))
        return x


def script(folder: Path, module: nn.Module) -> Path:
    torch.jit.script(module).save(str(folder / "net.pt"))
    return folder / "net.pt"


@pytest.mark.parametrize("module", [Endless(), EndlessToLoad()])
def test_an_endless_script_ends_at_the_limit_of_time(tmp_path: Path, module: nn.Module) -> None:
    started = time.monotonic()
    with pytest.raises(OutOfTime, match=r"runs the feature network net\.pt took longer than its limit of 2 s"):
        FeatureNetwork(script(tmp_path, module), limits=SOON).extract(IMAGES)
    assert time.monotonic() - started < 60


def test_a_script_that_takes_all_memory_ends_at_its_limit_and_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = FeatureNetwork(script(tmp_path / "other", Times(1.0)))
    before = other.extract(IMAGES)[0]
    network = FeatureNetwork(script(tmp_path, Growing()), limits=Limits(memory=1 << 30))
    with pytest.raises(OutOfMemory, match=r"runs the feature network net\.pt ran out of memory"):
        network.extract(IMAGES)
    np.testing.assert_array_equal(other.extract(IMAGES)[0], before)
    again = FeatureNetwork(script(tmp_path / "other", Times(2.0)))  # the file was replaced
    np.testing.assert_array_equal(again.extract(IMAGES)[0], 2 * before)


def onnx_file(folder: Path, nodes: list[Any], constants: dict[str, Any], side: int | str = "H") -> Path:
    from onnx import TensorProto, helper, numpy_helper

    takes = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, side, side])
    gives = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "net", [takes], [gives], stored),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


def test_an_endless_graph_ends_at_the_limit_of_time(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    tensor = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Sin", ["v"], ["w"])],
        "body",
        [tensor("i", TensorProto.INT64, []), tensor("go", TensorProto.BOOL, []), tensor("v", TensorProto.FLOAT, None)],
        [tensor("on", TensorProto.BOOL, []), tensor("w", TensorProto.FLOAT, None)],
    )
    loop = helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)
    path = onnx_file(tmp_path, [loop], {"trips": np.int64(1 << 60), "yes": np.bool_(True)})
    with pytest.raises(OutOfTime, match=r"net\.onnx took longer than its limit of 1 s"):
        FeatureNetwork(path, limits=Limits(time=1.0)).extract(IMAGES)


def test_a_graph_for_absurd_pictures_is_refused_before_any_is_made(tmp_path: Path) -> None:
    from onnx import helper

    path = onnx_file(tmp_path, [helper.make_node("Identity", ["x"], ["y"])], {}, side=1 << 20)
    with pytest.raises(BadInput, match=r"takes pictures of 1048576 x 1048576 pixels; allowed is 1 to 4096"):
        FeatureNetwork(path)


def test_a_script_in_a_bundle_is_refused(tmp_path: Path) -> None:
    """A script reads and writes files: only one that the user names is run."""
    bundle = hand_made.text_bundle(tmp_path / "a.bundle", {"small": hand_made.made_member("small", inputs={})})
    network = script(tmp_path, Endless())
    np.savez(tmp_path / "real.npz", np.zeros((4, 8, 8, 3), np.uint8))
    (bundle.root / "quality").mkdir()
    parts = [hand_made.component(bundle.root, "quality", file) for file in (network, tmp_path / "real.npz")]
    manifest = msgspec.structs.replace(
        bundle.manifest,
        quality=Quality(network=parts[0], reference=parts[1]),
        decoder=Decoder(kind="pixel", factor=1),
    )
    with pytest.raises(Untrusted, match=r"net\.pt is a TorchScript program") as caught:
        Scorer.of(Bundle(bundle.root, manifest), "fid")
    assert "--features" in caught.value.hint
