"""Networks that a user or a bundle brings, run in a child process with limits of time and memory.

The child keeps the last few open from one batch to the next. Whatever a network does there, this process gets arrays or
an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.child import DEFAULT, Array, Channel, Job, Limits, run_in_child
from tstitch_engines.errors import BadInput, FailedWork
from tstitch_trt.study.quality.loading import Net, open_network

__all__ = ["LARGEST_SIDE", "Facts", "ForeignNetwork", "NetworkFile", "check_side", "job_of", "opened", "stamp_of"]

LARGEST_SIDE: Final = 4096  # pixels that a network may want along each side; published ones want up to 518
_SECONDS: Final = 600.0  # the limit of loading a network, and of one batch
_KEPT: Final = 4

T = TypeVar("T")


class NetworkFile(msgspec.Struct, frozen=True, kw_only=True):
    """``stamp`` changes with the file. ``what``: the word for it in errors."""

    path: str
    stamp: str
    threads: int
    what: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """As in ``loading.Net``."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtype: str
    channels: int
    size: tuple[int, int] | None
    keywords: tuple[str, ...]
    scripted: bool


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """``keywords``: of a script."""

    file: NetworkFile
    arrays: tuple[Array, ...]
    keywords: dict[str, bool]


_open: Final[OrderedDict[NetworkFile, Any]] = OrderedDict()  # in the child: the last used at the end


def opened(file: NetworkFile, make: Callable[[], T]) -> T:
    """What ``make`` gives for ``file``, made once while it is among the last ``_KEPT`` that were asked for."""
    if file not in _open:
        while len(_open) >= _KEPT:
            _open.popitem(last=False)
        _open[file] = make()
    _open.move_to_end(file)
    found: T = _open[file]
    return found


def _net(file: NetworkFile) -> Net:
    return opened(file, lambda: open_network(Path(file.path), threads=file.threads, what=file.what))


def describe(request: NetworkFile, channel: Channel) -> Facts:
    net = _net(request)
    return Facts(
        inputs=net.inputs,
        outputs=net.outputs,
        dtype=net.dtype,
        channels=net.channels,
        size=net.size,
        keywords=tuple(sorted(net.keywords)),
        scripted=net.scripted,
    )


def run_batch(request: Batch, channel: Channel) -> dict[str, Array]:
    found = _net(request.file).run([array.numpy() for array in request.arrays], request.keywords)
    arrays = {name: np.asarray(value) for name, value in found.items()}
    for name, values in arrays.items():
        if values.dtype.kind not in "biuf":
            raise BadInput(
                f"the {request.file.what} gives {values.dtype} in {name!r}; allowed are numbers",
                hint="export it with outputs that are numbers",
            )
    return {name: Array.of(values) for name, values in arrays.items()}


# --- in this process


def stamp_of(path: Path) -> str:
    """Another one for a file that was replaced or written to."""
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{state.st_dev}-{state.st_ino}-{state.st_size}-{state.st_mtime_ns}"


def job_of(what: str, path: Path, limits: Limits) -> Job:
    return Job(
        what=f"the process that runs the {what} {path.name}",
        seconds=_SECONDS,
        limits=limits,
        error=FailedWork,
        if_killed="free memory, or use a smaller network",
        if_crashed="the network or its library crashed: export it again, or use another",
    )


def check_side(size: tuple[int, int] | None, what: str) -> None:
    """Raises ``BadInput`` for a network that wants pictures larger than any does."""
    if size is not None and not 1 <= min(size) <= max(size) <= LARGEST_SIDE:
        raise BadInput(
            f"the {what} takes pictures of {size[1]} x {size[0]} pixels; allowed is 1 to {LARGEST_SIDE} a side",
            hint="export it for a smaller size",
        )


class ForeignNetwork:
    """A network file; ``facts`` is what it says of itself. Any thread may call ``run``."""

    def __init__(self, path: Path, *, threads: int, what: str, limits: Limits = DEFAULT) -> None:
        """Raises ``BadInput`` for a file that is no network, ``Unavailable`` for a missing library."""
        if not path.is_file():
            raise BadInput(f"the {what} {path} does not exist", hint="give a .onnx or TorchScript file")
        self._file = NetworkFile(path=str(path.absolute()), stamp=stamp_of(path), threads=threads, what=what)
        self._job = job_of(what, path, limits)
        self.facts = run_in_child(describe, self._file, self._job)
        check_side(self.facts.size, f"{what} {path.name}")

    def run(
        self, arrays: Sequence[NDArray[Any]], keywords: Mapping[str, bool] | None = None
    ) -> dict[str, NDArray[Any]]:
        """All outputs by name (by number where they have none) for the inputs in order, and keywords of a script.

        Raises ``BadInput`` for what the network refuses, ``FailedWork``, ``OutOfTime`` and ``OutOfMemory``.
        """
        batch = Batch(file=self._file, arrays=tuple(map(Array.of, arrays)), keywords=dict(keywords or {}))
        return {name: found.numpy() for name, found in run_in_child(run_batch, batch, self._job).items()}
