"""Building bundles: what is reused, what is kept, and that every backend computes what PyTorch computes."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.tiny import TinyPair
from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.bundle.identity import digest, model_digest
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.compile.load import load_engine
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadBundle, BadEngine, Unavailable
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_export.planning.recipe import load_recipe

Arrays = dict[str, Any]


def inputs(member: Any, batch: int, labels: int) -> Arrays:
    rng = np.random.default_rng(batch)
    (_, *shape) = member.inputs[0].shape
    return {
        "sample": rng.standard_normal((batch, *shape), dtype=np.float32),
        "timestep": (rng.random(batch) * 999).astype(np.float32),
        "labels": rng.integers(0, labels, batch),
    }


def run(bundle: Bundle, name: str, backend: str, arrays: Arrays) -> Any:
    """One call of an engine through the backend's own bind and enqueue."""
    member = bundle.manifest.members[name]
    record = next(r for r in member.engines if r.identity.backend == backend)
    device = open_device("cpu")
    engine = load_engine(bundle, name, record, open_backend(backend), device, threads=1, trusted=False)
    batch = len(arrays["labels"])
    buffers = {s.name: device.empty(s.resolve({"B": batch}), s.dtype) for s in (*member.inputs, *member.outputs)}
    for key, value in arrays.items():
        device.upload(buffers[key], value)
    engine.bind(buffers, batch=batch)
    engine.enqueue()
    result = device.download(buffers["model_output"])
    engine.close()
    return result


@pytest.fixture
def tiny(tiny_pair: TinyPair, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """Arguments that build the tiny pair, whose components are in the session's cache, and a copy of its bundle."""
    shutil.copytree(tiny_pair.bundle, tmp_path / "tiny.bundle")
    members = {name: tiny_pair.checkpoint(name) for name in ("small", "large")}
    arguments = {"recipe": tiny_pair.recipe("small", "large"), "members": members, "profile": Range(1, 4, 8)}
    return arguments, tmp_path / "tiny.bundle"


def said(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if word in r.getMessage()]


def test_manifest(tiny: tuple[dict[str, Any], Path], tiny_pair: TinyPair) -> None:
    manifest = open_bundle(tiny[1]).manifest
    for name, member in manifest.members.items():
        assert member.check is not None
        assert member.check.rel_l2 < 1e-5
        (source,) = member.sources
        assert (source.name, source.shipped) == (f"{name}.safetensors", False)
        (engine,) = member.engines
        assert engine.identity.onnx_sha256 == model_digest(member.onnx)
        assert engine.identity.profile.dims["B"] == Range(1, 4, 8)
        assert engine.identity.backend_version == manifest.versions["onnxruntime"]
    assert {"torch", "onnx", "onnxscript"} <= manifest.versions.keys()
    assert str(tiny_pair.folder) not in (tiny[1] / "manifest.json").read_text(), "no path of the build machine"


def test_engines_equal_pytorch(tiny: tuple[dict[str, Any], Path], tiny_pair: TinyPair) -> None:
    bundle = open_bundle(tiny[1])
    for name, member in bundle.manifest.members.items():
        for batch in (1, 3, 8):
            arrays = inputs(member, batch, 11)
            with torch.no_grad():
                want = tiny_pair.model(name)(*(torch.from_numpy(x) for x in arrays.values())).numpy()
            got = run(bundle, name, "onnxruntime", arrays)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_second_build_makes_nothing(tiny: tuple[dict[str, Any], Path], caplog: pytest.LogCaptureFixture) -> None:
    arguments, output = tiny
    before = open_bundle(output).manifest
    with caplog.at_level(logging.INFO):
        assert build(output=output, **arguments) == before
    assert not said(caplog, "building")
    assert len(said(caplog, "reused from the cache")) == 2, "the two exports"
    assert len(said(caplog, "reused from the bundle")) == 2, "the two engines"
    caplog.clear()
    shutil.rmtree(output)
    with caplog.at_level(logging.INFO):
        assert build(output=output, **arguments) == before
    assert not said(caplog, "building")
    assert len(said(caplog, "reused from the cache")) == 4


def test_only_what_changed_is_made_again(tiny: tuple[dict[str, Any], Path], caplog: pytest.LogCaptureFixture) -> None:
    arguments, output = tiny
    before = open_bundle(output).manifest
    with caplog.at_level(logging.INFO):
        after = build(output=output, **(arguments | {"profile": Range(1, 2, 2)}))
    assert sorted(said(caplog, "building")) == [
        "member large: onnxruntime engine: building",
        "member small: onnxruntime engine: building",
    ]
    for name, member in after.members.items():
        (engine,) = member.engines
        assert engine.identity.profile.dims["B"] == Range(1, 2, 2)
        assert digest(engine.identity) != digest(before.members[name].engines[0].identity)
        assert member.onnx == before.members[name].onnx


def test_another_backend_is_added_and_agrees(tiny: tuple[dict[str, Any], Path], tiny_pair: TinyPair) -> None:
    arguments, output = tiny
    before = open_bundle(output).manifest
    build(output=output, backend="torch", **arguments)
    bundle = open_bundle(output)
    for name, member in bundle.manifest.members.items():
        assert [r.identity.backend for r in member.engines] == ["onnxruntime", "torch"], "the first stays the default"
        assert member.engines[0] == before.members[name].engines[0]
        for batch in (1, 5):
            arrays = inputs(member, batch, 11)
            with torch.no_grad():
                want = tiny_pair.model(name)(*(torch.from_numpy(x) for x in arrays.values())).numpy()
            assert np.abs(run(bundle, name, "torch", arrays) - want).max() <= 1e-5 * np.abs(want).max()
    assert {"torch", "onnxruntime"} <= bundle.manifest.versions.keys()

    other = tiny_pair.model("small").state_dict()
    other["blocks.0.mlp.fc1.bias"] += 1
    torch.save(other, output.parent / "small2.pt")
    members = arguments["members"] | {"small": output.parent / "small2.pt"}
    after = build(output=output, **(arguments | {"members": members}), options={"small.num_heads": "2"})
    assert [r.identity.backend for r in after.members["small"].engines] == ["onnxruntime"], (
        "torch's is of other weights"
    )
    assert [r.identity.backend for r in after.members["large"].engines] == ["onnxruntime", "torch"]
    open_bundle(output)


def test_damaged_engines(tiny: tuple[dict[str, Any], Path], caplog: pytest.LogCaptureFixture) -> None:
    arguments, output = tiny
    build(output=output, backend="torch", **arguments)
    bundle = open_bundle(output)
    for record in bundle.manifest.members["small"].engines:
        path = bundle.path(record.files[0])
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadEngine, match="can't load the engine"):
            run(bundle, "small", record.identity.backend, inputs(bundle.manifest.members["small"], 1, 11))
        with pytest.raises(BadBundle, match="truncated or altered"):
            open_bundle(output)
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BadBundle, match="is altered"):
            open_bundle(output)
        path.write_bytes(whole)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        build(output=output, **arguments)
    assert said(caplog, "was altered, not reused")
    open_bundle(output)


def half_precision(bundle: Bundle, name: str) -> Any:
    """PyTorch on the member's weights rounded to float16, from what training wrote (not from what was packed)."""
    from safetensors.torch import load_file

    from tstitch_export.families.dit.model import DiT
    from tstitch_export.train.fashion import MEMBERS

    model = DiT(MEMBERS[name]).eval()
    stored = load_file(bundle.path(bundle.manifest.members[name].onnx[1]))
    model.load_state_dict({key: value.half().float() if key != "pos_embed" else value for key, value in stored.items()})
    return model


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("fashion") / "fashion.bundle"
    build("fashion", output=output)
    return open_bundle(output)


def test_the_shipped_pair_equals_pytorch(fashion: Bundle) -> None:
    for name, member in fashion.manifest.members.items():
        model = half_precision(fashion, name)
        for batch in (1, 4):
            arrays = inputs(member, batch, 11)
            with torch.no_grad():
                want = model(*(torch.from_numpy(x) for x in arrays.values())).numpy()
            assert np.abs(run(fashion, name, "onnxruntime", arrays) - want).max() <= 1e-4 * np.abs(want).max()


def test_the_shipped_pair_is_small_and_whole(fashion: Bundle) -> None:
    folder = load_recipe("fashion")[1] / "../pairs/fashion"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    manifest = fashion.manifest
    assert all(member.sources[0].shipped for member in manifest.members.values())
    assert all(member.check is not None for member in manifest.members.values())
    assert "--member" not in fashion.rebuild_command
    assert manifest.quality is not None


def test_the_quality_network_tells_the_test_split_it_was_measured_on(fashion: Bundle) -> None:
    import onnxruntime

    quality = fashion.manifest.quality
    assert quality is not None
    with np.load(fashion.path(quality.reference), allow_pickle=False) as reference:
        assert reference["mean"].shape == (64,)
        assert reference["covariance"].shape == (64, 64)
        assert np.linalg.eigvalsh(reference["covariance"]).min() > -1e-9
        assert int(reference["count"]) == 10_000
        assert float(reference["accuracy"]) >= 0.92
        single = reference["features"].astype(np.float64)
        assert single.shape == (10_000, 64)
        np.testing.assert_allclose(single.mean(0), reference["mean"], atol=1e-3)
        np.testing.assert_allclose(np.cov(single.T), reference["covariance"], atol=1e-2)
    session = onnxruntime.InferenceSession(str(fashion.path(quality.network)), providers=["CPUExecutionProvider"])
    features, logits = session.run(["features", "logits"], {"images": np.zeros((3, 1, 28, 28), np.float32)})
    assert features.shape == (3, 64)
    assert logits.shape == (3, 10)


BARE = """
import importlib.abc, sys
from pathlib import Path
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "safetensors", "diffusers"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Refuse())
from tstitch_engines.errors import Unavailable
from tstitch_export.build import build
output = Path(sys.argv[1])
build("fashion", output=output)
try:
    build("fashion", output=output, members={"large": Path(sys.argv[2])})
except Unavailable as error:
    assert 'pip install "tstitch-trt[export]"' in error.hint, error
else:
    raise SystemExit("built without torch")
try:
    build("fashion", output=output, backend="torch")
except Unavailable as error:
    assert 'pip install "tstitch-trt[export]"' in error.hint, error
else:
    raise SystemExit("built without torch")
"""


def test_fashion_builds_without_torch_and_onnx(tmp_path: Path) -> None:
    """In a process where they can't be imported; another checkpoint for a member then says what to install."""
    weights = load_recipe("fashion")[1] / "../pairs/fashion/large.safetensors"
    other = tmp_path / "other.safetensors"
    shutil.copyfile(weights, other)
    subprocess.run([sys.executable, "-c", BARE, str(tmp_path / "out"), str(other)], check=True)
    assert open_bundle(tmp_path / "out").manifest.name == "fashion"


def test_fashion_with_another_checkpoint(fashion: Bundle, tmp_path: Path) -> None:
    """A given file goes through torch's export, also where the recipe ships a graph; the result is the same."""
    shipped = fashion.path(fashion.manifest.members["small"].onnx[1])
    shutil.copyfile(shipped, tmp_path / "mine.safetensors")
    manifest: Manifest = build("fashion", output=tmp_path / "out", members={"small": tmp_path / "mine.safetensors"})
    bundle = open_bundle(tmp_path / "out")
    assert [p.path for p in manifest.members["small"].onnx] == ["small/model.onnx"]
    assert manifest.members["large"] == fashion.manifest.members["large"]
    assert "--member small=mine.safetensors" in bundle.rebuild_command
    arrays = inputs(manifest.members["small"], 3, 11)
    got, want = (run(b, "small", "onnxruntime", arrays) for b in (bundle, fashion))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_torch_backend_names_a_missing_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(Unavailable, match="sees 0 CUDA devices; wanted is cuda:0"):
        open_backend("torch").arch("cuda")
