"""Bundles the tests share, built once; the component cache of the user who runs the tests is left alone."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.tiny import TinyPair

# Started in the background (`pytest &`, some CI runners) this process ignores Ctrl-C, and so would every child that the
# tests interrupt: a handler here is the default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes longest comes first, so that of two processes none waits long for the other at the end; and the families,
# which want the exports of the pipelines too, when those are made.
_LONG = ("pipeline", "test_readme.py", "test_class_pairs.py", "test_families.py", "test_cpu_families.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        names = {item.path.name, item.path.parent.name}
        return next((index for index, name in enumerate(_LONG) if name in names), len(_LONG))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As ``--dist loadfile``, but the pipelines all go to one process: they build the same bundles, and two processes
    would wait for each other."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return str(Path(file).parent) if Path(file).parent.name == "pipeline" else file

    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all processes of a run (pytest-xdist): exports take most of the time, and equal ones are made once.

    ``$TSTITCH_TEST_CACHE`` keeps it between runs, for people who change nothing about exporting.
    """
    before = os.environ.get("TSTITCH_TRT_CACHE")
    base = tmp_path_factory.getbasetemp()
    own = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")
    os.environ["TSTITCH_TRT_CACHE"] = os.environ.get("TSTITCH_TEST_CACHE", own)
    yield
    if before is None:
        del os.environ["TSTITCH_TRT_CACHE"]
    else:
        os.environ["TSTITCH_TRT_CACHE"] = before


@pytest.fixture(scope="session")
def kernels_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA driver of the step kernels, compiled for the host."""
    from support.cuda_stand_in import compile_kernels

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    return compile_kernels(compiler, tmp_path_factory.mktemp("cuda_on_host") / "launch.so")


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def fashion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The built-in pair, built once from what the package ships; who adds studies to it works on a copy."""
    from tstitch_export.build import build

    output = tmp_path_factory.mktemp("fashion") / "fashion.bundle"
    build("fashion", output=output)
    yield output
    assert not (output / "studies").exists(), "a test wrote its studies into the bundle that all tests share"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where wheels that tests look into are kept: ``$TSTITCH_TEST_WHEELS`` to keep them between runs."""
    chosen = os.environ.get("TSTITCH_TEST_WHEELS")
    return Path(chosen) if chosen else Path(tmp_path_factory.mktemp("wheels"))
