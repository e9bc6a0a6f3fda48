"""CUDA graphs: a stretch of a stream's work recorded once and launched again with one call.

Not run on a GPU (see ``cuda``). The recording goes through ``cuda.bindings`` and not through cuda.core's graph
builder, because an engine may refuse while it is being recorded, and the builder can't end a broken recording.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from tstitch_engines.device.base import NotCaptured
from tstitch_engines.errors import FailedWork

__all__ = ["REFUSED", "CudaGraph", "capture"]

# Kinds of nodes that must not be replayed. A call of a host function would run again with arguments that its maker has
# freed after the first run (ONNX Runtime releases staging memory so).
REFUSED: Final = {"cudaGraphNodeTypeHost": "a call of a host function"}
_HINT = "the work runs call by call; with graph='off' nothing is recorded"


class CudaGraph:
    """An instantiated graph and the stream it is launched on."""

    def __init__(self, runtime: Any, executable: Any, stream: int, nodes: int, count: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._executable = executable
        self._stream = stream
        self._count = count
        self.nodes = nodes

    def launch(self) -> None:
        self._count("graph launch")
        code = self._runtime.cudaGraphLaunch(self._executable, self._stream)[0]
        if int(code) != 0:
            raise FailedWork(
                f"a CUDA graph of {self.nodes} nodes can't be launched: {_text(self._runtime, code)}",
                hint="load with graph='off' to run call by call and see which call fails",
            )

    def close(self) -> None:
        if self._executable is not None:
            self._runtime.cudaGraphExecDestroy(self._executable)
            self._executable = None


def capture(runtime: Any, stream: int, work: Callable[[], None], count: Callable[[str], None]) -> CudaGraph:
    """Records ``work`` on ``stream``. Raises ``NotCaptured``; the recording is ended in every case.

    Thread-local mode: what other threads do on the device meanwhile can't break the recording.
    """
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    code = runtime.cudaStreamBeginCapture(stream, mode)[0]
    if int(code) != 0:
        raise NotCaptured(f"this stream can't be recorded: {_text(runtime, code)}", hint=_HINT)
    refusal: Exception | None = None
    graph = None
    collecting = gc.isenabled()
    gc.disable()  # device memory that happens to be collected now would be freed on this stream, inside the recording
    try:
        work()
    except Exception as error:
        refusal = error
    finally:  # also for a KeyboardInterrupt: a stream that stays in recording mode is useless
        code, graph = runtime.cudaStreamEndCapture(stream)
        if collecting:
            gc.enable()
        runtime.cudaGetLastError()  # a broken recording leaves its error behind, for the next call to find
    if refusal is not None or int(code) != 0:
        if int(code) == 0:
            runtime.cudaGraphDestroy(graph)
        reason = _text(runtime, code) if refusal is None else f"{type(refusal).__name__}: {refusal}".splitlines()[0]
        raise NotCaptured(f"the work can't be recorded: {reason}", hint=_HINT) from refusal
    try:
        nodes = _check_nodes(runtime, graph)
        code, executable = runtime.cudaGraphInstantiate(graph, 0)
    finally:
        runtime.cudaGraphDestroy(graph)
    if int(code) != 0:
        runtime.cudaGetLastError()
        raise NotCaptured(f"the recorded graph can't be instantiated: {_text(runtime, code)}", hint=_HINT)
    runtime.cudaGraphUpload(executable, stream)  # so that the first launch costs what the others cost
    return CudaGraph(runtime, executable, stream, nodes, count)


def _check_nodes(runtime: Any, graph: Any) -> int:
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
        if kind == "cudaGraphNodeTypeMemcpy" and _touches_pageable(runtime, node):
            raise NotCaptured("the recorded graph holds a copy from or to ordinary host memory", hint=_HINT)
    made, freed = kinds["cudaGraphNodeTypeMemAlloc"], kinds["cudaGraphNodeTypeMemFree"]
    if made != freed:
        raise NotCaptured(
            f"the recorded graph holds {made} allocations and {freed} releases of memory; allowed are equally many",
            hint=_HINT,
        )
    return total


def _touches_pageable(runtime: Any, node: Any) -> bool:
    """Whether a copy has one end in memory that CUDA did not allocate: its owner may have reused that by a replay.

    (A tensor that some library computes on the host and feeds to the device, baked in with its address.)
    """
    params = _ok(runtime, runtime.cudaGraphMemcpyNodeGetParams(node))[1]
    kinds = runtime.cudaMemcpyKind
    if params.kind == kinds.cudaMemcpyDeviceToDevice:
        return False
    for end in (params.srcPtr.ptr, params.dstPtr.ptr):
        memory = _ok(runtime, runtime.cudaPointerGetAttributes(int(end)))[1].type
        if memory == runtime.cudaMemoryType.cudaMemoryTypeUnregistered:
            return True
    return False


def _ok(runtime: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise NotCaptured(f"the recorded graph can't be read: {_text(runtime, result[0])}", hint=_HINT)
    return result


def _text(runtime: Any, code: Any) -> str:
    return f"{runtime.cudaGetErrorString(code)[1].decode()} (CUDA error {int(code)})"
