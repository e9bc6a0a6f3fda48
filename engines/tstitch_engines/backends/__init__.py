"""The backends by name. A backend's module, and the library behind it, is imported when the backend is opened."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from tstitch_engines.backends.base import Backend, Engine
from tstitch_engines.errors import unknown_name

__all__ = ["BACKENDS", "Backend", "Engine", "open_backend"]

BACKENDS: Final = {
    "onnxruntime": ("tstitch_engines.backends.onnxruntime", "OnnxRuntimeBackend"),
    "tensorrt": ("tstitch_engines.backends.tensorrt", "open_tensorrt"),
    "tensorrt-rtx": ("tstitch_engines.backends.tensorrt", "open_tensorrt_rtx"),
    "torch": ("tstitch_engines.backends.torch_reference", "TorchBackend"),
}


def open_backend(name: str) -> Backend:
    """The backend called ``name``. Raises ``UnknownName``, or ``Unavailable`` when its library is not installed."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    module, attribute = BACKENDS[name]
    backend: Backend = getattr(import_module(module), attribute)()
    return backend
