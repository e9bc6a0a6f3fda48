"""``build BUNDLE``: engines for one more backend or target, from the bundle's own ONNX."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.bundles import draw, files
from support.command import Command, refused
from support.tiny import TinyPair
from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.identity import model_digest
from tstitch_engines.spec import Range

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def copy(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pair.bundle, tmp_path / "copy.bundle"))


def test_build_from_a_bundle_needs_neither_checkpoints_nor_torch(copy: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from tstitch_trt.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'onnx', 'diffusers'} & set(sys.modules), 'imported'\n"
    )
    other = tmp_path / "other.bundle"
    words = ["build", copy, "--batch", "1:2:5", "--option", "graph-optimisation=basic", "-o", other]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "TSTITCH_TRT_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(other)
    made, source = open_bundle(other).manifest, open_bundle(copy).manifest
    for name, member in made.members.items():
        (engine,) = member.engines
        assert engine.identity.profile.dims == {"B": Range(1, 2, 5)}
        assert engine.identity.options == {"graph-optimisation": "basic"}
        assert engine.identity.onnx_sha256 == model_digest(source.members[name].onnx)
        assert (member.onnx, member.sources, member.check) == (
            source.members[name].onnx,
            source.members[name].sources,
            source.members[name].check,
        )
    assert (made.recipe, made.defaults, made.latent) == (source.recipe, source.defaults, source.latent)
    np.testing.assert_allclose(draw(other), draw(copy), rtol=1e-4, atol=1e-5)


@needs_rtx
def test_build_adds_another_backend_beside(run: Command, copy: Path) -> None:
    before = files(copy)
    outcome = run("build", copy, "--backend", "tensorrt-rtx", "--option", "compute-capabilities=8.9", "--json")
    assert outcome.code == 0, outcome.err
    manifest = open_bundle(copy).manifest
    for member in manifest.members.values():
        assert [engine.identity.backend for engine in member.engines] == ["onnxruntime", "tensorrt-rtx"]
        assert member.engines[1].identity.profile.dims == {"B": Range(1, 4, 8)}, "that of the other engine"
        assert member.engines[1].identity.arch == "sm_89"
    assert manifest.versions["tensorrt-rtx"] == open_backend("tensorrt-rtx").version()
    after = files(copy)
    assert {k: v for k, v in after.items() if k in before and k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }
    draw(copy)
    # again: nothing to do; with other options: replaced; without any: as recorded
    assert "building" not in run("build", copy, "--backend", "tensorrt-rtx").err
    assert files(copy).keys() == after.keys()
    assert run("build", copy, "--backend", "tensorrt-rtx", "--option", "compute-capabilities=8.6").code == 0
    arches = [e.identity.arch for e in open_bundle(copy).manifest.members["small"].engines]
    assert arches == ["x86_64-avx512f" if "avx512f" in arches[0] else arches[0], "sm_89", "sm_86"]


@needs_rtx
def test_a_verbosity_is_given_on_top_of_the_recorded_options(run: Command, copy: Path) -> None:
    line = ("build", copy, "--backend", "tensorrt-rtx")
    assert run(*line, "--option", "compute-capabilities=8.9").code == 0
    outcome = run(*line, "--profiling-verbosity", "detailed", "--option", "profiling-verbosity=names")
    refused(outcome, "--profiling-verbosity detailed and --option profiling-verbosity=names contradict each other")
    assert run(*line, "--profiling-verbosity", "detailed").code == 0
    for member in open_bundle(copy).manifest.members.values():
        engine = member.engines[1]
        assert engine.identity.options == {"compute-capabilities": "8.9", "profiling-verbosity": "detailed"}
        plan, layers = (Path(part.path).name for part in engine.files)
        assert layers == f"{plan}.layers.json"
    refused(run("build", copy, "--profiling-verbosity", "names"), "profiling-verbosity", "onnxruntime")


def test_a_recorded_list_of_gpus_gets_the_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    rtx = open_backend("tensorrt-rtx")
    recorded = {"compute-capabilities": "8.6,8.9", "workspace": 64}
    assert rtx.options_for(recorded, "cpu") == recorded
    monkeypatch.setattr(type(rtx), "arch", lambda self, device: "sm_120")
    assert rtx.options_for(recorded, "cuda") == {"compute-capabilities": "8.6,8.9,12.0", "workspace": 64}
    monkeypatch.setattr(type(rtx), "arch", lambda self, device: "sm_89")
    assert rtx.options_for(recorded, "cuda") == recorded
    assert rtx.options_for({}, "cuda") == {}


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("build PAIR --precision fp16", ("--precision fp16", "is a bundle", "build from the recipe")),
        ("build PAIR --option opset=22", ("--option opset=22", "is a bundle", "build from the recipe")),
        ("build PAIR --member small=a", ("--member small=a", "is a bundle")),
        ("build PAIR --option tiling=fast", ("'tiling'", "onnxruntime")),
        ("build PAIR --option small.num_heads=2", ("'small.num_heads'",)),
        ("build PAIR --backend tensorflow", ("'tensorflow'", "onnxruntime")),
        ("build PAIR --height 64", ("dimension H", "one fixed size", "--member small=")),
        ("build PAIR --batch 4:2", ("4:2", "MIN <= OPT <= MAX")),
        ("build EMPTY", ("is no bundle", "has no manifest.json")),
    ],
)
def test_bad_input_is_refused_with_a_hint(
    run: Command, copy: Path, tmp_path: Path, line: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    before = files(copy)
    places = {"PAIR": copy, "EMPTY": tmp_path / "empty"}
    refused(run(*(places.get(word, word) for word in line.split())), *parts)
    assert files(copy) == before
