"""The driver is asked as NVIDIA documents it, and every hint names the packages that it runs."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from support.nvidia_driver import OLD, install_driver
from test_layers import modules
from tstitch_engines import driver
from tstitch_engines.backends import BACKENDS
from tstitch_engines.backends.tensorrt.flavour import FLAVOURS, Flavour
from tstitch_engines.backends.tensorrt.library import open_library
from tstitch_engines.driver import DRIVERS, Gpu, driver_cuda, fitting_extra, list_gpus
from tstitch_engines.errors import Unavailable
from tstitch_engines.needs import require

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def no_library() -> None:
    raise OSError("libcuda.so.1: cannot open shared object file")


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, nvidia_driver: Path) -> None:
    install_driver(monkeypatch, nvidia_driver, cuda=OLD, gpus=2)
    assert driver_cuda() == (12, 4)
    assert list_gpus() == (Gpu("NVIDIA H100 PCIe", (9, 0), 80 * 2**30),) * 2


def test_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch, nvidia_driver: Path) -> None:
    install_driver(monkeypatch, nvidia_driver, init=803)
    with pytest.raises(OSError, match=r"does not start: system has unsupported .* combination \(CUDA error 803\)"):
        list_gpus()
    assert driver_cuda() == (13, 0)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_library", no_library)
    assert driver_cuda() is None
    assert fitting_extra("rtx") == "rtx"


@pytest.mark.parametrize(
    ("cuda", "extra"), [(11080, "gpu-cu12"), (12000, "gpu-cu12"), (12090, "gpu-cu12"), (13000, "gpu"), (14010, "gpu")]
)
def test_the_extra_that_fits(monkeypatch: pytest.MonkeyPatch, nvidia_driver: Path, cuda: int, extra: str) -> None:
    install_driver(monkeypatch, nvidia_driver, cuda=cuda)
    assert fitting_extra("gpu") == extra
    assert fitting_extra("export") == "export"


def test_hints_name_what_fits(monkeypatch: pytest.MonkeyPatch, nvidia_driver: Path) -> None:
    install_driver(monkeypatch, nvidia_driver, cuda=OLD)
    for flavour in FLAVOURS.values():
        with monkeypatch.context() as absent:
            for name in flavour.modules:
                absent.setitem(sys.modules, name, None)
            with pytest.raises(Unavailable) as caught:
                open_library(flavour)
        assert f'"tstitch-trt[{flavour.extra}-cu12]"' in caught.value.hint
    with pytest.raises(Unavailable, match="a test needs no_such_module") as caught:
        require("no_such_module", "a test", extra="gpu")
    assert '"tstitch-trt[gpu-cu12]"' in caught.value.hint


def test_no_hint_names_a_release_by_itself() -> None:
    """Else it would be wrong for half of the drivers."""
    release = re.compile(r"tstitch-trt\[[^\]{]*\b(?:gpu|rtx|tensorrt)\b|\bcu1\d\b|-cu1\d")
    named = {name for name, path in modules().items() if release.search(path.read_text())}
    assert named == {"tstitch_engines.driver", "tstitch_engines.make_fatbin"}  # in prose


@pytest.mark.parametrize("extra", ["gpu", "rtx", "tensorrt"])
def test_every_extra_is_for_one_release(extra: str) -> None:
    newest, *older = sorted(DRIVERS, reverse=True)
    for release in (newest, *older):
        name = extra if release == newest else f"{extra}-cu{release}"
        requirements = [Requirement(text) for text in EXTRAS[name]]
        (core,) = (found for found in requirements if found.name == "cuda-core")
        assert core.extras == {f"cu{release}"}
        for found in requirements:
            assert re.findall(r"-cu(\d+)", found.name) in ([], [str(release)])
            if found.name == "onnxruntime-gpu":  # whose wheels changed from CUDA 12 to 13 with 1.27
                assert found.specifier.contains("1.26.0") == (release == 12)
                assert found.specifier.contains("1.28.0") == (release == 13)


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=lambda flavour: flavour.name)
def test_the_versions_of_what_extras_install_are_recorded(flavour: Flavour) -> None:
    """With studies, whose times depend on them."""
    names = {Requirement(text).name for suffix in ("", "-cu12") for text in EXTRAS[flavour.extra + suffix]}
    assert set(BACKENDS[flavour.name].packages) <= names
