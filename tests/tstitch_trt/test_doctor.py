"""``doctor`` on machines with a driver: a real process with NVIDIA's libraries, over a stand-in for the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.nvidia_driver import OLD, environment
from tstitch_trt import doctor

pytest.importorskip("cuda.core", reason="cuda-core is not installed")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")


def examined(driver: Path, **said: int) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    """What ``doctor --json`` says, and its findings by group and name."""
    done = subprocess.run(
        [sys.executable, "-m", "tstitch_trt.cli", "doctor", "--json"],
        env={**os.environ, "LD_LIBRARY_PATH": str(driver), **environment(**said)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(check["hint"] for check in found["checks"] if not check["ok"])
    return found, {(check["group"], check["name"]): check for check in found["checks"]}


def test_a_driver_older_than_the_packages(nvidia_driver: Path) -> None:
    found, checks = examined(nvidia_driver, cuda=OLD)
    assert found["usable"]  # on the CPU
    assert found["on_gpu"] == []
    assert checks["cuda", "driver"]["detail"].endswith("runs CUDA 12.4 and older")
    assert checks["cuda", "cuda:0"]["detail"] == "NVIDIA H100 PCIe, compute capability 9.0, 80.0 GiB"
    bindings = checks["cuda release", "cuda-bindings"]
    assert "is for CUDA 13 (driver 580 or newer); the driver here runs CUDA 12.4" in bindings["detail"]
    assert bindings["hint"] == 'update the NVIDIA driver to 580 or newer, or pip install "cuda-core[cu12]"'
    rtx = checks["cuda release", "tensorrt-rtx-cu13-libs"]
    assert not rtx["ok"]
    assert rtx["hint"].endswith(
        'pip uninstall tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings && pip install "tstitch-trt[rtx-cu12]"'
    )
    assert "wants 13" in checks["backend", "tensorrt-rtx on cuda"]["detail"]
    assert checks["backend", "tensorrt-rtx without a GPU"]["ok"]
    assert '"tstitch-trt[tensorrt-cu12]"' in checks["backend", "tensorrt on cuda"]["hint"]


def test_a_driver_that_fits_and_one_that_does_not_start(nvidia_driver: Path) -> None:
    _, checks = examined(nvidia_driver, cuda=13000, gpus=2)
    assert checks["cuda", "cuda:1"]["ok"]
    assert checks["cuda release", "cuda-bindings"]["ok"]
    if checks["cuda", "step kernels for CUDA"]["ok"]:
        assert checks["cuda", "step kernels on cuda:1"]["detail"] == "machine code of 9.0"
    _, checks = examined(nvidia_driver, init=803)
    assert "(CUDA error 803)" in checks["cuda", "gpu"]["detail"]
    assert "reboot" in checks["cuda", "gpu"]["hint"]


def test_a_driver_older_than_every_package(nvidia_driver: Path) -> None:
    _, checks = examined(nvidia_driver, cuda=11080)
    assert checks["cuda release", "cuda-bindings"]["hint"] == "update the NVIDIA driver to 580 or newer"


def test_packages_of_both_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the same modules."""
    known = {"tensorrt-rtx-cu12-libs": "1.7.1", "tensorrt-rtx-cu13-libs": "1.7.1"}
    monkeypatch.setattr(doctor, "package_version", known.get)
    (both,) = (check for check in doctor.examine().checks if check.name == "one of each")
    assert not both.ok
    assert both.hint == (
        "pip uninstall tensorrt-rtx-cu12-libs tensorrt-rtx-cu12-bindings tensorrt-rtx-cu13-libs "
        'tensorrt-rtx-cu13-bindings && pip install "tstitch-trt[rtx]"'
    )
