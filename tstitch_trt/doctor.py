"""Finds out what this machine can build and run, and how to mend what it can't."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Final, NamedTuple

import msgspec

from tstitch_engines.backends import BACKENDS, open_backend
from tstitch_engines.driver import (
    DRIVERS,
    Gpu,
    driver_cuda,
    driver_version,
    fitting_cuda,
    fitting_extra,
    list_gpus,
)
from tstitch_engines.errors import TStitchError
from tstitch_engines.quiet import silence_output
from tstitch_trt.study.machine import Machine, describe_machine, package_version

__all__ = ["Examination", "Finding", "examine"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. ``ok`` false means that something can't be done here; ``hint`` then says how to mend it."""

    group: str
    name: str
    ok: bool
    detail: str
    hint: str = ""


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """``usable``: the CPU backend and the step kernels work, so bundles can be built from shipped parts and run.

    ``on_gpu``: the backends that compile for the first GPU and run on it.
    """

    usable: bool
    on_gpu: tuple[str, ...]
    machine: Machine
    checks: tuple[Finding, ...]


class Package(NamedTuple):
    """``names``: what it is installed as; the first is looked for. ``{}`` stands for the CUDA release."""

    names: tuple[str, ...]
    purpose: str
    extra: str
    before: str = ""
    after: str = ""

    @property
    def install(self) -> str:
        return f'pip install "tstitch-trt[{fitting_extra(self.extra)}]"'

    def installed(self) -> dict[int, str]:
        """By CUDA release (0: in no name) what is there. Two of them overwrite each other's files."""
        releases = DRIVERS if "{}" in self.names[0] else (0,)
        return {release: name for release in releases if package_version(name := self.names[0].format(release))}

    def uninstall(self, *releases: int) -> str:
        return f"pip uninstall {' '.join(name.format(release) for release in releases for name in self.names)}"


_GPU: Final = "needed only for an NVIDIA GPU: pip uninstall onnxruntime && "
PACKAGES: Final = (
    Package(("onnxruntime",), "ONNX Runtime on the CPU", "cpu", after=", unless onnxruntime-gpu is installed"),
    Package(("onnxruntime-gpu",), "ONNX Runtime on CUDA", "gpu", _GPU),
    Package(("cuda-core",), "CUDA buffers, streams and kernels", "gpu", _GPU),
    Package(
        ("tensorrt-cu{}", "tensorrt-cu{}-libs", "tensorrt-cu{}-bindings"),
        "TensorRT engines", "tensorrt", "needed only for --backend tensorrt: ",
    ),
    Package(
        ("tensorrt-rtx-cu{}-libs", "tensorrt-rtx-cu{}-bindings"),
        "TensorRT-RTX engines", "rtx", "needed only for --backend tensorrt-rtx: ",
    ),
    Package(("torch",), "exporting checkpoints, the torch backend", "export"),
    Package(("onnx",), "exporting checkpoints", "export"),
    Package(("diffusers",), "checkpoints in diffusers folders", "export"),
    Package(("safetensors",), ".safetensors checkpoints", "export"),
    Package(("matplotlib",), "bench --plot", "plot"),
    Package(("nvidia-modelopt",), "tstitch-trt quantise", "quant"),
)  # fmt: skip


def examine() -> Examination:
    """Examines everything; never raises for what is missing."""
    compiler = "install from a wheel, or with a C++17 compiler: pip install ."
    kernels = _attempt("native", "step kernels", _host_kernels, hint=compiler)
    driver = driver_cuda()
    checks = (*_packages(), kernels, *_cuda(driver), *_releases(driver), *_backends())
    good = {(c.group, c.name) for c in checks if c.ok}
    runs = ("cuda", "step kernels on cuda:0") in good
    return Examination(
        usable={("native", "step kernels"), ("backend", "onnxruntime on cpu")} <= good,
        on_gpu=tuple(name for name in BACKENDS if runs and ("backend", f"{name} on cuda") in good),
        machine=describe_machine(),
        checks=checks,
    )


def _check(group: str, name: str, ok: bool, detail: str, hint: str = "") -> Finding:
    return Finding(group=group, name=name, ok=ok, detail=detail, hint="" if ok else hint)


def _packages() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    modern = sys.version_info >= (3, 11)
    yield _check("python", "python", modern, f"{python} at {sys.executable}", "install Python 3.11 or newer")
    for package in PACKAGES:
        found = package.installed()
        how = f"{package.before}{package.install}{package.after}"
        for name in found.values() or [package.names[0].format(fitting_cuda())]:
            version = package_version(name) or "not installed"
            yield _check("python", name, bool(found), f"{version} ({package.purpose})", how)
        if len(found) > 1:
            yield _both(list(found.values()), f"{package.uninstall(*found)} && {package.install}")
    runtimes = [name for name in ("onnxruntime", "onnxruntime-gpu") if package_version(name)]
    if len(runtimes) > 1:
        yield _both(runtimes, f"pip uninstall {' '.join(runtimes)}, then install one of the extras cpu and gpu")


def _both(names: list[str], hint: str) -> Finding:
    detail = f"{' and '.join(names)} are both installed and overwrite each other's files"
    return _check("python", "one of each", False, detail, hint)


def _host_kernels() -> str:
    import tstitch_engines.device.host_kernels  # noqa: F401

    return "compiled for this Python"


def _cuda(driver: tuple[int, int] | None) -> Iterator[Finding]:
    install = "on a machine with an NVIDIA GPU install its driver; without one use --device cpu"
    own = driver_version()
    says = f"{own + ', ' if own else ''}runs CUDA {_dotted(driver)} and older" if driver else ""
    yield _check("cuda", "driver", driver is not None, says or "there is none: no libcuda.so.1 answers", install)
    gpus: tuple[Gpu, ...] = ()
    if driver is not None:
        try:
            gpus, problem = list_gpus(), "CUDA shows no GPU"
        except OSError as error:
            problem = str(error)
        listed = "nvidia-smi must list the GPU: reboot after an update of the driver, start a container with --gpus all"
        if not gpus:
            yield _check("cuda", "gpu", False, problem, listed)
    for index, gpu in enumerate(gpus):
        told = f"{gpu.name}, compute capability {_dotted(gpu.capability)}, {gpu.memory_bytes / 2**30:.1f} GiB"
        yield _check("cuda", f"cuda:{index}", True, told)
    nvcc = shutil.which("nvcc")
    without = "not needed: without it, python -m tstitch_engines.make_fatbin compiles the CUDA step kernels"
    yield _check("cuda", "nvcc", nvcc is not None, nvcc or "not on PATH", without)
    make = f'pip install "tstitch-trt[{fitting_extra("gpu")}]" && python -m tstitch_engines.make_fatbin'
    yield _attempt("cuda", "step kernels for CUDA", _fatbin, hint=make)
    for index, gpu in enumerate(gpus):
        yield _attempt("cuda", f"step kernels on cuda:{index}", partial(_image, gpu, driver), hint=make)


def _fatbin() -> str:
    from tstitch_engines.device.cuda_kernels import find_fatbin

    return str(find_fatbin())


def _image(gpu: Gpu, driver: tuple[int, int] | None) -> str:
    from tstitch_engines.device.cuda_kernels import find_fatbin
    from tstitch_engines.device.fatbin import image_for

    image = image_for(find_fatbin(), gpu.capability, driver)
    return f"{image}, compiled when it is first loaded" if image.cuda else f"machine code of {image}"


def _releases(driver: tuple[int, int] | None) -> Iterator[Finding]:
    """Of what is installed: the CUDA release it is for, which the driver must run."""
    fit = fitting_cuda(driver)
    for name, version, release, how in _installed(fit):
        runs = driver is None or release <= driver[0]
        detail = f"{version} is for CUDA {release} (driver {DRIVERS.get(release, 'of that release')} or newer)"
        update = f"update the NVIDIA driver to {DRIVERS.get(release, max(DRIVERS.values()))} or newer"
        mend = f"{update}, or {how}" if driver is not None and driver[0] >= min(DRIVERS) else update
        yield _check("cuda release", name, runs, detail if runs else f"{detail}; {_driver(driver)}", mend)


def _driver(runs: tuple[int, int] | None) -> str:
    return f"the driver here runs CUDA {_dotted(runs)} and older" if runs else "no driver here"


def _installed(fit: int) -> Iterator[tuple[str, str, int, str]]:
    """Package, version, CUDA release, and how to get the one of release ``fit``."""
    if version := package_version("cuda-bindings"):
        yield "cuda-bindings", version, int(version.partition(".")[0]), f'pip install "cuda-core[cu{fit}]"'
    for package in PACKAGES:
        for release, name in package.installed().items():
            if release:
                yield name, package_version(name) or "", release, f"{package.uninstall(release)} && {package.install}"
    if (version := package_version("onnxruntime-gpu")) and (release := _release_of("onnxruntime", "cuda_version")):
        yield "onnxruntime-gpu", version, release, f'pip install "tstitch-trt[{fitting_extra("gpu")}]"'
    if (version := package_version("torch")) and (release := _release_of("torch", "version.cuda")):
        yield "torch", version, release, f"install PyTorch for CUDA {fit} as pytorch.org says"


def _release_of(module: str, attribute: str) -> int:
    """What ``module`` says of the CUDA that it was built with; 0 when it says nothing or can't be imported."""
    try:
        with silence_output():
            said = attrgetter(attribute)(import_module(module))
        return int(str(said or 0).partition(".")[0])
    except Exception:  # a library that is broken is told of by its backend
        return 0


def _backends() -> Iterator[Finding]:
    for name, entry in BACKENDS.items():
        for device in ("cuda",) if entry.gpu_only else ("cpu", "cuda"):
            run = partial(_open, name, device)
            yield _attempt("backend", f"{name} on {device}", run, hint="see the findings above")
        try:
            built = open_backend(name).build_arch("cpu", {}) if entry.gpu_only else ""
        except TStitchError:
            continue  # it compiles where it runs
        if built:
            yield _check("backend", f"{name} without a GPU", True, f"compiles for {built}, to be run elsewhere")


def _open(name: str, device: str) -> str:
    """Compiled for and run on: TensorRT-RTX does not know every GPU."""
    from tstitch_engines.device.open import open_device

    backend = open_backend(name)
    arch = backend.build_arch(device, {})
    open_device(device)
    return f"{backend.version()} for {arch}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _attempt(group: str, name: str, examine: Callable[[], str], *, hint: str) -> Finding:
    """``examine`` returns the detail, or raises: libraries fail to load with any exception."""
    try:
        return Finding(group=group, name=name, ok=True, detail=examine())
    except TStitchError as error:
        return Finding(group=group, name=name, ok=False, detail=error.message, hint=error.hint)
    except Exception as error:
        return Finding(group=group, name=name, ok=False, detail=str(error) or type(error).__name__, hint=hint)
