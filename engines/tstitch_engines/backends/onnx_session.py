"""The only place where ONNX Runtime opens a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tstitch_engines.bundle.onnx_files import check_onnx
from tstitch_engines.needs import require

__all__ = ["open_session"]


def open_session(
    path: Path, beside: Collection[str] = (), *, settings: Any, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> Any:
    """An ``InferenceSession`` of the ONNX model ``path``. ``beside``: names of files in its folder that it may read.

    Without the Python class's fallback, which prints and uses other providers. Raises ``Unsafe``
    and ``NotOnnx`` (``bundle.onnx_files.check_onnx``), ``Unavailable`` and whatever ONNX Runtime raises.
    """
    ort = require("onnxruntime", "running ONNX", extra="cpu")
    check_onnx(path, beside)
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file's name says
    return ort.InferenceSession(str(path), settings, providers=list(providers), enable_fallback=0)
