"""CUDA's errors as ours. cuda.core raises a class that is no public name, cuda.bindings returns codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from tstitch_engines.errors import FailedWork, OutOfMemory, first_line

__all__ = ["attempt", "check", "error_text"]

T = TypeVar("T")

_HINT: Final = (
    "run with CUDA_LAUNCH_BLOCKING=1 to see which call fails; where all later calls fail too, the GPU is lost to this "
    "process, which has to be started again"
)


def attempt(what: str, call: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """``call(*arguments, **keywords)``. An error of cuda.core's becomes ``FailedWork``, or ``OutOfMemory``.

    ``what`` begins the message: ``cuda:0: a kernel could not be started``.
    """
    try:
        return call(*arguments, **keywords)
    except Exception as error:
        if not type(error).__module__.startswith("cuda."):
            raise
        raise _failed(what, first_line(error)) from error


def check(what: str, runtime: Any, result: tuple[Any, ...]) -> None:
    """Raises as ``attempt`` does for a call of cuda.bindings that did not succeed."""
    if int(result[0]) != 0:
        raise _failed(what, error_text(runtime, result[0]))


def error_text(runtime: Any, code: Any) -> str:
    return f"{runtime.cudaGetErrorString(code)[1].decode()} (CUDA error {int(code)})"


def _failed(what: str, text: str) -> FailedWork:
    if "OUT_OF_MEMORY" in text or "out of memory" in text:
        return OutOfMemory(
            f"{what}: {text}",
            hint="use a smaller batch, or free memory that other programs hold (nvidia-smi lists them)",
        )
    return FailedWork(f"{what}: {text}", hint=_HINT)
