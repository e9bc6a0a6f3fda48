"""Bundles the tests share, built once; the component cache of the user who runs the tests is left alone."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.tiny import TinyPair

# Before numpy, torch and ONNX Runtime are loaded: one process a core with one thread each, so that they don't compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# TorchInductor compiles a program for each instruction set of this CPU to learn whether the compiler has it: 15 s.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# Options and folders of whoever runs the tests are not those of the tests.
for _name in [name for name in os.environ if name.startswith("TSTITCH_TRT_")]:
    del os.environ[_name]

# Started in the background (`pytest &`, some CI runners) this process ignores Ctrl-C, and so would every child that the
# tests interrupt: a handler here is the default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What builds the same networks goes to one process, because two would wait for each other.
_TOGETHER = {
    "pipelines": ("tstitch_trt/pipeline/",),
    "ray": ("serve/test_ray_",),
    "families": ("tstitch_export/families/", "tensorrt/test_families.py", "test_cpu_families.py"),
}
# Its tests, a page each, share nothing: they go to whoever is free.
_APART = "docs/test_snippets.py"
# What takes longest comes first, so that of two processes none waits long for the other at the end; and the families,
# which want the exports of the pipelines too, when those are made.
_LONG = (
    *_TOGETHER["pipelines"],
    _APART,
    "test_class_pairs.py",
    *_TOGETHER["families"],
    "runtime/test_lora.py",
    "test_ui.py",
    "benchmarks/test_gpu.py",
    "benchmarks/test_soak.py",
    "cli/test_quantise.py",
    "test_torch_compile.py",
    "verify/test_verify.py",
    "test_evaluate.py",
    "test_c_library.py",
    "test_cuda_runtime.py",
    "test_solvers_diffusers.py",
    "serve/test_ray_app.py",
    "test_pair_builds.py",
    "tstitch_export/test_build.py",
    "test_build_interrupted.py",
    "tstitch_export/quantise/",
    "serve/test_ray_bulk.py",
    "serve/test_serve_command.py",
    "serve/test_triton.py",
    "test_calibrate.py",
)
# They end the process that exports and compiles for all tests of theirs, and the next export loads PyTorch again.
_LAST = ("test_absurd_graphs.py", "child/test_child.py", "test_verify_limits.py", "test_foreign_networks.py")
_SLOW_SECONDS = 3600  # that a test marked `slow` may take


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        if any(part in path for part in _LAST):
            return len(_LONG) + 1
        return next((index for index, part in enumerate(_LONG) if part in path), len(_LONG))

    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(_SLOW_SECONDS))


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: the garbage collector, a tenth of an export's time, leaves them out."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: a file stays in one process, in the order above, and so do the files of ``_TOGETHER``."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            if _APART in file:
                return nodeid
            return next((name for name, parts in _TOGETHER.items() if any(part in file for part in parts)), file)

    if config.getoption("dist") not in ("load", "loadfile"):
        return None  # another --dist was asked for
    config.option.loadscopereorder = False
    return ByFile(config, log)


def _shared(factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole run, of all processes (pytest-xdist)."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder that the first process of a run to want it makes, and the others wait for."""
    path = _shared(factory) / "once" / name
    path.parent.mkdir(exist_ok=True)
    with path.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One for all processes of a run (pytest-xdist): exports take most of the time, and equal ones are made once.

    ``$TSTITCH_TEST_CACHE`` keeps it between runs, for people who change nothing about exporting.
    """
    own = str(_shared(tmp_path_factory) / "cache")
    os.environ["TSTITCH_TRT_CACHE"] = os.environ.get("TSTITCH_TEST_CACHE", own)
    os.environ["TSTITCH_TRT_CONFIG"] = ""  # not the defaults of whoever runs the tests


@pytest.fixture(scope="session")
def kernels_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA driver of the step kernels, compiled for the host."""
    from support.cuda_stand_in import compile_kernels

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    built = _made_once(tmp_path_factory, "launch.so", lambda path: compile_kernels(compiler, path))
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="session")
def nvidia_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stand-in for NVIDIA's driver."""
    from support.nvidia_driver import compile_driver

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    return _made_once(tmp_path_factory, "driver", lambda folder: compile_driver(compiler, folder))


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def fashion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The built-in pair, built once from what the package ships; who adds studies to it works on a copy."""
    from tstitch_export.build import build

    output = _made_once(tmp_path_factory, "fashion.bundle", lambda path: build("fashion", output=path))
    yield output
    assert not (output / "studies").exists(), "a test wrote its studies into the bundle that all tests share"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where wheels that tests look into are kept: ``$TSTITCH_TEST_WHEELS`` to keep them between runs."""
    chosen = os.environ.get("TSTITCH_TEST_WHEELS")
    return Path(chosen) if chosen else Path(tmp_path_factory.mktemp("wheels"))
