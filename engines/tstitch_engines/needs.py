"""The libraries that only some work needs, imported with an error that says how to get them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tstitch_engines.driver import fitting_extra
from tstitch_engines.errors import Unavailable

__all__ = ["require", "require_installed"]


def require(module: str, what: str, *, extra: str = "export", instead: str = "") -> Any:
    """Imports ``module``. Raises ``Unavailable`` naming ``what`` needs it and the extra that installs it.

    ``instead``: what helps without it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(module, what, extra, instead, error) from error


def require_installed(package: str, what: str, *, extra: str = "export") -> None:
    """Raises what ``require`` does for a ``package`` that is not there, without importing it: a child process does."""
    try:
        if find_spec(package) is not None:
            return
        problem = ImportError(f"No module named {package!r}")
    except ImportError as error:
        problem = error
    raise _missing(package, what, extra, "", problem)


def _missing(module: str, what: str, extra: str, instead: str, error: ImportError) -> Unavailable:
    return Unavailable(
        f"{what} needs {module.partition('.')[0]}, which is not installed or does not start ({error})",
        hint=f'pip install "tstitch-trt[{fitting_extra(extra)}]"' + (f", or {instead}" if instead else ""),
    )
