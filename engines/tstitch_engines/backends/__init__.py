"""The backends by name. A backend's module, and the library behind it, is imported when the backend is opened."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

from tstitch_engines.backends.base import Backend, Engine
from tstitch_engines.bundle.manifest import EngineIdentity
from tstitch_engines.driver import DRIVERS
from tstitch_engines.errors import unknown_name

__all__ = ["BACKENDS", "Backend", "Engine", "describe_file", "for_gpu", "open_backend"]


class _Entry(NamedTuple):
    """Where a backend is, and what has to be known of it where its library is not installed."""

    module: str  # of this package
    attribute: str
    packages: tuple[str, ...]  # their versions decide how fast its engines are
    from_onnx: bool = True  # else it compiles exported programs, which a bundle does not hold
    gpu_only: bool = False
    plans: str = ""  # the module that reads what its engine files say without the library


_TENSORRT: Final = tuple(f"tensorrt-cu{release}" for release in DRIVERS)
_RTX: Final = tuple(f"tensorrt-rtx-cu{release}-libs" for release in DRIVERS)
BACKENDS: Final[Mapping[str, _Entry]] = {
    "onnxruntime": _Entry("onnxruntime", "OnnxRuntimeBackend", ("onnxruntime", "onnxruntime-gpu")),
    "tensorrt": _Entry("tensorrt", "open_tensorrt", _TENSORRT, gpu_only=True, plans="tensorrt.plan"),
    "tensorrt-rtx": _Entry("tensorrt", "open_tensorrt_rtx", _RTX, gpu_only=True, plans="tensorrt.plan"),
    "torch": _Entry("torch_reference", "TorchBackend", ("torch",), from_onnx=False),
}


def open_backend(name: str) -> Backend:
    """The backend called ``name``. Raises ``UnknownName``, or ``Unavailable`` when its library is not installed."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    backend: Backend = getattr(import_module(f"{__name__}.{BACKENDS[name].module}"), BACKENDS[name].attribute)()
    return backend


def for_gpu(backend: str, arch: str) -> bool:
    """Whether engines with this identity run on GPUs and not on the CPU."""
    return (backend in BACKENDS and BACKENDS[backend].gpu_only) or arch.startswith(("sm_", "cuda"))


def describe_file(identity: EngineIdentity, path: Path, again: str) -> str | None:
    """What an engine file says of itself, checked without the backend's library (``tensorrt.plan.describe_plan``)."""
    module = BACKENDS[identity.backend].plans if identity.backend in BACKENDS else ""
    found: str | None = import_module(f"{__name__}.{module}").describe_plan(identity, path, again) if module else None
    return found
