"""Engines that are tied to a GPU model: which of a bundle's fits, what is replaced, what is said where none does.

TensorRT's part is what its backend says of itself; what it compiles is a stand-in that is never loaded.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from support.command import Command
from support.hand_made import made_member, text_bundle
from tstitch_engines.backends import open_backend
from tstitch_engines.backends.tensorrt import TensorRtBackend
from tstitch_engines.backends.tensorrt import backend as module
from tstitch_engines.backends.tensorrt.flavour import RTX
from tstitch_engines.backends.tensorrt.library import open_library
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import EngineRecord
from tstitch_engines.compile.bundle import recompile
from tstitch_engines.compile.load import load_engine
from tstitch_engines.compile.select import select_engine
from tstitch_engines.device import cuda
from tstitch_engines.errors import BadEngine
from tstitch_engines.spec import Range

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


class Machine:
    """The GPU that is there, and its driver."""

    gpu = H100
    driver = "CUDA 13.0, 580.95.05"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """One whose TensorRT compiles: its bindings are TensorRT-RTX's, its plans say where they were made."""
    machine = Machine()

    def compile_plan(self: Any, job: Any) -> tuple[Path, ...]:
        job["output"].write_bytes(f"a plan for {machine.gpu}".ljust(64).encode())
        return (job["output"],)

    monkeypatch.setitem(sys.modules, "tensorrt", open_library(RTX))
    monkeypatch.setattr(TensorRtBackend, "_compile", compile_plan)
    monkeypatch.setattr(TensorRtBackend, "arch", lambda self, device: "sm_90")
    monkeypatch.setattr(module, "gpu_and_driver", lambda index: (machine.gpu, machine.driver))
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    return machine


@pytest.fixture
def bundle(machine: Machine, tmp_path: Path) -> Bundle:
    return text_bundle(
        tmp_path / "made.bundle", {"small": made_member("small", inputs={})}, sides=Range(8, 8, 8), batch=Range(1, 1, 2)
    )


def of_tensorrt(bundle: Bundle) -> list[EngineRecord]:
    return [e for e in open_bundle(bundle.root).manifest.members["small"].engines if e.identity.backend == "tensorrt"]


def selected(bundle: Bundle) -> EngineRecord:
    return select_engine(open_bundle(bundle.root), "small", open_backend("tensorrt"), "cuda")


def test_an_engine_of_another_model_of_one_architecture_is_refused(machine: Machine, bundle: Bundle) -> None:
    """H100 and H200 are both sm_90. What was compiled where is said, and what compiles it again."""
    recompile(bundle, backend="tensorrt", device="cuda")
    assert selected(bundle).identity.gpu == H100
    machine.gpu = H200
    with pytest.raises(BadEngine, match=f"gpu is {H100} in the bundle and {H200} here") as caught:
        selected(bundle)
    assert "--backend tensorrt --device cuda" in caught.value.hint


def test_engines_of_two_models_lie_side_by_side(machine: Machine, bundle: Bundle) -> None:
    for gpu in (H100, H200, H100):  # the last one is there, or is compiled again: neither touches the other's
        machine.gpu = gpu
        recompile(open_bundle(bundle.root), backend="tensorrt", device="cuda")
    assert {record.identity.gpu for record in of_tensorrt(bundle)} == {H100, H200}
    for gpu in (H100, H200):
        machine.gpu = gpu
        assert selected(bundle).identity.gpu == gpu
        assert gpu in bundle.path(selected(bundle).files[0]).read_text()
    machine.gpu = "NVIDIA GH200 480GB"
    with pytest.raises(BadEngine, match=r"gpu is NVIDIA H.*and NVIDIA GH200 480GB here"):
        selected(bundle)


@pytest.mark.parametrize("option", ["ampere+", "same"])
def test_a_hardware_compatible_engine_names_no_model(machine: Machine, bundle: Bundle, option: str) -> None:
    recompile(bundle, backend="tensorrt", device="cuda", options={"hardware-compatible": option})
    (record,) = of_tensorrt(bundle)
    assert record.identity.gpu is msgspec.UNSET
    machine.gpu = H200
    assert selected(bundle) == record


def test_an_engine_that_was_made_before_models_were_recorded(machine: Machine, bundle: Bundle) -> None:
    """It loads; one that is compiled now takes its place."""
    recompile(bundle, backend="tensorrt", device="cuda")
    path = bundle.root / "manifest.json"
    old = msgspec.json.decode(path.read_bytes())
    (engine,) = [e for e in old["members"]["small"]["engines"] if e["identity"]["backend"] == "tensorrt"]
    del engine["identity"]["gpu"], engine["driver"]
    path.write_bytes(msgspec.json.encode(old))
    (record,) = of_tensorrt(bundle)
    machine.gpu = H200
    assert selected(bundle) == record
    assert digest(record.identity) == digest(engine["identity"])
    recompile(open_bundle(bundle.root), backend="tensorrt", device="cuda")
    assert [record.identity.gpu for record in of_tensorrt(bundle)] == [H200]


@pytest.mark.parametrize(
    ("driver", "older"),
    [
        ("CUDA 12.8, 570.86.15", True),
        ("CUDA 13.0, 580.65.06", True),
        ("CUDA 13.0, 580.95.05", False),
        ("CUDA 13.1, 590.44.01", False),
        ("CUDA 13.0", False),  # all that is known
        ("CUDA 12.8", True),
    ],
)
def test_an_older_driver_is_warned_of(
    machine: Machine,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    driver: str,
    older: bool,
) -> None:
    """An engine compiled with a newer one may want what this one lacks; the identity stays the same."""
    recompile(bundle, backend="tensorrt", device="cuda")
    machine.driver = driver
    record = selected(bundle)
    assert record.driver == Machine.driver
    backend, device = open_backend("tensorrt"), SimpleNamespace(name="cuda:0")
    monkeypatch.setattr(backend, "load", lambda path, **_: path)
    with caplog.at_level(logging.WARNING):
        load_engine(open_bundle(bundle.root), "small", record, backend, device, threads=0, trusted=True)  # type: ignore[arg-type]
    said = f"compiled with the driver CUDA 13.0, 580.95.05, and this machine has {driver}, which is older"
    assert (said in caplog.text) == older


def test_inspect_shows_model_and_driver(machine: Machine, bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    recompile(bundle, backend="tensorrt", device="cuda")
    run = Command(capfd)
    assert f"for sm_90 ({H100}), fp32, compiled with the driver {machine.driver}" in run("inspect", bundle.root).out
    plain, ours = run("inspect", bundle.root, "--json").json["members"]["small"]["engines"]
    assert (ours["identity"]["gpu"], ours["driver"]) == (H100, machine.driver)
    assert not {"gpu", "driver"} & {*plain, *plain["identity"]}  # a CPU's engines know no such thing


@pytest.mark.parametrize(("told", "driver"), [("580.95.05", "CUDA 13.0, 580.95.05"), (None, "CUDA 13.0")])
def test_what_a_gpu_and_its_driver_are_called(monkeypatch: pytest.MonkeyPatch, told: str | None, driver: str) -> None:
    core = pytest.importorskip("cuda.core")
    monkeypatch.setattr(core, "Device", lambda index: SimpleNamespace(name=f"GPU {index}"))
    runtime = SimpleNamespace(cudaDriverGetVersion=lambda: (0, 13000))
    monkeypatch.setattr(cuda, "cuda_bindings", lambda index: runtime)
    monkeypatch.setattr(cuda, "driver_version", lambda: told)
    assert cuda.gpu_and_driver(1) == ("GPU 1", driver)


def test_tensorrt_rtx_names_no_model(machine: Machine) -> None:
    backend = open_backend("tensorrt-rtx")
    for device in ("cpu", "cuda"):
        assert backend.build_gpu(device, {}) is backend.driver(device) is msgspec.UNSET
