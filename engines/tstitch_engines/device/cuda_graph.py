"""CUDA graphs: a stretch of a stream's work recorded once and launched again with one call.

Not run on a GPU (see ``cuda``). The recording goes through ``cuda.bindings`` and not through cuda.core's graph
builder, because an engine may refuse while it is being recorded, and the builder can't end a broken recording.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from tstitch_engines.device.base import NotCaptured
from tstitch_engines.device.cuda_errors import error_text
from tstitch_engines.errors import FailedWork, first_line

__all__ = ["BROKEN", "REFUSED", "CudaGraph", "capture"]

# Kinds of nodes that must not be replayed. A call of a host function would run again with arguments that its maker has
# freed after the first run (ONNX Runtime releases staging memory so).
REFUSED: Final = {"cudaGraphNodeTypeHost": "a call of a host function"}
# cudaErrorStreamCaptureUnsupported, -Invalidated and -Implicit: what ends a recording that another thread broke.
BROKEN: Final = (900, 901, 906)
_TRIES: Final = 3
_HINT = "the work runs call by call; with graph='off' nothing is recorded"

_log = logging.getLogger(__name__)


class _Broken(NotCaptured):
    """A recording that was sound until something invalidated it."""


class CudaGraph:
    """An instantiated graph and the stream it is launched on. Dropped without ``close`` it is freed too."""

    def __init__(self, runtime: Any, executable: Any, stream: int, nodes: int, count: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._executable = executable
        self._stream = stream
        self._count = count
        self._free = weakref.finalize(self, runtime.cudaGraphExecDestroy, executable)
        self._free.atexit = False
        self.nodes = nodes

    def launch(self) -> None:
        assert self._free.alive, "the graph is closed"
        self._count("graph launch")
        code = self._runtime.cudaGraphLaunch(self._executable, self._stream)[0]
        if int(code) != 0:
            raise FailedWork(
                f"a CUDA graph of {self.nodes} nodes can't be launched: {error_text(self._runtime, code)}",
                hint="load with graph='off' to run call by call and see which call fails",
            )

    def close(self) -> None:
        """CUDA frees one that is under way when it is done (documentation of ``cuGraphExecDestroy``)."""
        self._free()


def capture(
    runtime: Any, stream: int, work: Callable[[], None], count: Callable[[str], None], *, uploads: bool
) -> CudaGraph:
    """Records ``work`` on ``stream``. Raises ``NotCaptured``; the recording is ended in every case.

    ``uploads``: copies from ordinary host memory are allowed (``Device.capture``).

    Thread-local mode: what is forbidden while a stream is recorded is so for this thread only. But another thread that
    waits for the whole device breaks the recording in any mode (NVIDIA/TensorRT issue 2888): then it is tried again.
    The caller holds ``RECORDING``.
    """
    for _ in range(_TRIES - 1):
        try:
            return _instantiate(runtime, stream, _record(runtime, stream, work), count, uploads)
        except _Broken as error:
            _log.info("a recording was broken and is tried again: %s", error.message)
    return _instantiate(runtime, stream, _record(runtime, stream, work), count, uploads)


def _record(runtime: Any, stream: int, work: Callable[[], None]) -> Any:
    """What ``work`` enqueues as a graph. Raises ``NotCaptured``, as ``_Broken`` where that may be another's doing."""
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    code = runtime.cudaStreamBeginCapture(stream, mode)[0]
    if int(code) != 0:
        raise NotCaptured(f"this stream can't be recorded: {error_text(runtime, code)}", hint=_HINT)
    refusal: BaseException | None = None
    collecting = gc.isenabled()
    gc.disable()  # what some library's objects free when they are collected now would be forbidden on this thread
    try:
        try:
            work()
        except BaseException as error:
            refusal = error
    finally:  # also for a KeyboardInterrupt: a stream that stays in recording mode is useless
        code, graph = runtime.cudaStreamEndCapture(stream)
        if collecting:
            gc.enable()
        runtime.cudaGetLastError()  # a broken recording leaves its error behind, for the next call to find
    if refusal is None and int(code) == 0:
        return graph
    if int(code) == 0:
        runtime.cudaGraphDestroy(graph)
    if refusal is not None and not isinstance(refusal, Exception):
        raise refusal
    reason = error_text(runtime, code) if refusal is None else f"{type(refusal).__name__}: {first_line(refusal)}"
    kind = _Broken if int(code) in BROKEN else NotCaptured
    raise kind(f"the work can't be recorded: {reason}", hint=_HINT) from refusal


def _instantiate(runtime: Any, stream: int, graph: Any, count: Callable[[str], None], uploads: bool) -> CudaGraph:
    try:
        nodes = _check_nodes(runtime, graph, uploads)
        code, executable = runtime.cudaGraphInstantiate(graph, 0)
    finally:
        runtime.cudaGraphDestroy(graph)
    if int(code) != 0:
        runtime.cudaGetLastError()
        raise NotCaptured(f"the recorded graph can't be instantiated: {error_text(runtime, code)}", hint=_HINT)
    runtime.cudaGraphUpload(executable, stream)  # so that the first launch costs what the others cost
    return CudaGraph(runtime, executable, stream, nodes, count)


def _check_nodes(runtime: Any, graph: Any, uploads: bool) -> int:
    """How many nodes there are. Raises ``NotCaptured`` when there are none, or some that must not be replayed.

    Memory that is allocated and freed within the graph is fine: cuBLAS takes its workspace so while a stream is
    recorded, unless its caller gave it one (PyTorch's pull requests 83461 and 124250 tell). What a graph allocates and
    leaves, or frees and did not allocate, is not.
    """
    total = int(_ok(runtime, runtime.cudaGraphGetNodes(graph))[2])
    if total == 0:
        raise NotCaptured("the recorded graph is empty: the work went to another stream", hint=_HINT)
    kinds: Counter[str] = Counter()
    for node in _ok(runtime, runtime.cudaGraphGetNodes(graph, total))[1]:
        kind = _ok(runtime, runtime.cudaGraphNodeGetType(node))[1].name
        kinds[kind] += 1
        if kind in REFUSED:
            raise NotCaptured(f"the recorded graph holds {REFUSED[kind]}", hint=_HINT)
        if kind == "cudaGraphNodeTypeMemcpy" and _touches_pageable(runtime, node, uploads):
            raise NotCaptured("the recorded graph holds a copy from or to ordinary host memory", hint=_HINT)
    made, freed = kinds["cudaGraphNodeTypeMemAlloc"], kinds["cudaGraphNodeTypeMemFree"]
    if made != freed:
        raise NotCaptured(
            f"the recorded graph holds {made} allocations and {freed} releases of memory; allowed are equally many",
            hint=_HINT,
        )
    return total


def _touches_pageable(runtime: Any, node: Any, uploads: bool) -> bool:
    """Whether a copy has one end in memory that CUDA did not allocate: its owner may have reused that by a replay.

    (A tensor that some library computes on the host and feeds to the device, baked in with its address.) With
    ``uploads`` the source does not count. A target does: what the host would do with it is not in the graph.
    """
    params = _ok(runtime, runtime.cudaGraphMemcpyNodeGetParams(node))[1]
    kinds = runtime.cudaMemcpyKind
    if params.kind == kinds.cudaMemcpyDeviceToDevice:
        return False
    for end in (params.dstPtr.ptr,) if uploads else (params.srcPtr.ptr, params.dstPtr.ptr):
        memory = _ok(runtime, runtime.cudaPointerGetAttributes(int(end)))[1].type
        if memory == runtime.cudaMemoryType.cudaMemoryTypeUnregistered:
            return True
    return False


def _ok(runtime: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise NotCaptured(f"the recorded graph can't be read: {error_text(runtime, result[0])}", hint=_HINT)
    return result
