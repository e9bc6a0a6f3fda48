"""The libraries that only some work needs, imported with an error that says how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tstitch_engines.errors import Unavailable

__all__ = ["require"]


def require(module: str, what: str, *, extra: str = "export", instead: str = "") -> Any:
    """Imports ``module``. Raises ``Unavailable`` naming ``what`` needs it and the extra that installs it.

    ``instead``: what helps without it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Unavailable(
            f"{what} needs {package}, which is not installed or does not start ({error})",
            hint=f'pip install "tstitch-trt[{extra}]"' + (f", or {instead}" if instead else ""),
        ) from error
