"""Finds out what this machine can build and run, and how to mend what it can't."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator

import msgspec

from tstitch_engines.driver import driver_cuda
from tstitch_engines.errors import TStitchError
from tstitch_trt.study.machine import Machine, describe_machine, gpu_names, package_version

__all__ = ["Examination", "Finding", "examine"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. ``ok`` false means that something can't be done here; ``hint`` then says how to mend it."""

    group: str
    name: str
    ok: bool
    detail: str
    hint: str = ""


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """``usable``: the CPU backend and the step kernels work, so bundles can be built from shipped parts and run."""

    usable: bool
    machine: Machine
    checks: tuple[Finding, ...]


_GPU = 'needed only for an NVIDIA GPU: pip uninstall onnxruntime && pip install "tstitch-trt[gpu]"'

# package -> (what it is for, how to get it)
PACKAGES = {
    "onnxruntime": ("ONNX Runtime on the CPU", 'pip install "tstitch-trt[cpu]", unless onnxruntime-gpu is installed'),
    "onnxruntime-gpu": ("ONNX Runtime on CUDA", _GPU),
    "cuda-core": ("CUDA buffers, streams and kernels", _GPU),
    "tensorrt-cu13": ("TensorRT engines", 'needed only for --backend tensorrt: pip install "tstitch-trt[tensorrt]"'),
    "tensorrt-rtx-cu13-libs": (
        "TensorRT-RTX engines",
        'needed only for --backend tensorrt-rtx: pip install "tstitch-trt[rtx]"',
    ),
    "torch": ("exporting checkpoints, the torch backend", 'pip install "tstitch-trt[export]"'),
    "onnx": ("exporting checkpoints", 'pip install "tstitch-trt[export]"'),
    "diffusers": ("checkpoints in diffusers folders", 'pip install "tstitch-trt[export]"'),
    "safetensors": (".safetensors checkpoints", 'pip install "tstitch-trt[export]"'),
    "matplotlib": ("bench --plot", 'pip install "tstitch-trt[plot]"'),
    "nvidia-modelopt": ("tstitch-trt quantise", 'pip install "tstitch-trt[quant]"'),
}


def examine() -> Examination:
    """Examines everything; never raises for what is missing."""
    compiler = "install from a wheel, or with a C++17 compiler: pip install ."
    kernels = _attempt("native", "step kernels", _host_kernels, hint=compiler)
    checks = (*_packages(), kernels, *_cuda(), *_backends())
    by_name = {(c.group, c.name): c.ok for c in checks}
    usable = by_name.get(("native", "step kernels"), False) and by_name.get(("backend", "onnxruntime on cpu"), False)
    return Examination(usable=usable, machine=describe_machine(), checks=checks)


def _check(group: str, name: str, ok: bool, detail: str, hint: str = "") -> Finding:
    return Finding(group=group, name=name, ok=ok, detail=detail, hint="" if ok else hint)


def _packages() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    modern = sys.version_info >= (3, 11)
    yield _check("python", "python", modern, f"{python} at {sys.executable}", "install Python 3.11 or newer")
    for name, (purpose, how) in PACKAGES.items():
        found = package_version(name)
        yield _check("python", name, found is not None, f"{found or 'not installed'} ({purpose})", how)
    if package_version("onnxruntime") and package_version("onnxruntime-gpu"):
        yield _check(
            "python",
            "one ONNX Runtime",
            False,
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of the extras cpu and gpu",
        )


def _host_kernels() -> str:
    import tstitch_engines.device.host_kernels  # noqa: F401

    return "compiled for this Python"


def _cuda() -> Iterator[Finding]:
    gpus = gpu_names()
    driver = "on a machine with an NVIDIA GPU install its driver; without one use --device cpu"
    yield _check("cuda", "gpu", bool(gpus), "; ".join(gpus) or "no NVIDIA driver answers", driver)
    yield _attempt("cuda", "driver", _driver_version, hint="install an NVIDIA driver; without a GPU use --device cpu")
    nvcc = shutil.which("nvcc")
    without = "not needed: without it, python -m tstitch_engines.make_fatbin compiles the CUDA step kernels"
    yield _check("cuda", "nvcc", nvcc is not None, nvcc or "not on PATH", without)
    yield _attempt(
        "cuda",
        "step kernels for CUDA",
        _fatbin,
        hint='pip install "tstitch-trt[gpu]" && python -m tstitch_engines.make_fatbin',
    )


def _driver_version() -> str:
    found = driver_cuda()
    if found is None:
        raise RuntimeError("libcuda.so.1 is not on this machine")
    return f"supports CUDA {found[0]}.{found[1]}"


def _fatbin() -> str:
    from tstitch_engines.device.cuda_kernels import find_fatbin

    return str(find_fatbin())


def _backends() -> Iterator[Finding]:
    from tstitch_engines.backends import BACKENDS, open_backend

    for name in BACKENDS:
        for device in ("cpu", "cuda"):

            def load(name: str = name, device: str = device) -> str:
                from tstitch_engines.device.open import open_device

                backend = open_backend(name)
                arch = backend.arch(device)
                if device != "cpu":
                    backend.build_arch(device, {})  # TensorRT-RTX does not support every GPU
                open_device(device)
                return f"{backend.version()} for {arch}"

            yield _attempt("backend", f"{name} on {device}", load, hint="see the findings above")


def _attempt(group: str, name: str, examine: Callable[[], str], *, hint: str) -> Finding:
    """``examine`` returns the detail, or raises: libraries fail to load with any exception."""
    try:
        return Finding(group=group, name=name, ok=True, detail=examine())
    except TStitchError as error:
        return Finding(group=group, name=name, ok=False, detail=error.message, hint=error.hint)
    except Exception as error:
        return Finding(group=group, name=name, ok=False, detail=str(error) or type(error).__name__, hint=hint)
