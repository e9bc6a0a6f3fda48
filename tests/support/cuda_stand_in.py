"""CUDA in host memory: what ``CudaDevice`` and the step kernels' launches use of cuda.core and cuda.bindings.

The repo's own code above it runs unchanged, and the kernels are ``cuda_driver.cu`` compiled for the host. A stream is
as late as it can be: its work is done only when someone waits for it, and then only as far as needed. So work that
lacks an event sees stale data here, every time and not once in a while. Recording keeps work back in a graph; a launch
puts it into the stream again. It can't show what a GPU's timing or rounding is, or what real libraries do.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

__all__ = ["Machine", "compile_kernels", "install", "launch_on_host"]

ROOT = Path(__file__).parents[2]
WRAPPER = ROOT / "tests" / "support" / "cuda_on_host"


def compile_kernels(compiler: str, output: Path) -> ctypes.CDLL:
    """``cuda_driver.cu`` as a host library that walks the grid: see ``cuda_on_host/launch.cpp``."""
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Werror"]
    command += ["-fsanitize=undefined", "-fno-sanitize-recover", "-static-libubsan"]
    command += ["-I", str(WRAPPER), "-I", str(ROOT / "engines" / "src"), "-o", str(output)]
    subprocess.run([*command, str(WRAPPER / "launch.cpp")], check=True)
    return ctypes.CDLL(str(output))


def launch_on_host(library: ctypes.CDLL, config: Any, kernel: str, arguments: tuple[Any, ...]) -> Callable[[], None]:
    """The launch as work to be done later. cuda.core passes integers as pointers and numpy scalars by value."""
    values = [np.array(a, np.uint64) if isinstance(a, int) else np.array(a) for a in arguments]

    def work() -> None:
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        taken = library.launch(kernel.encode(), config.grid[0], config.grid[1], config.block[0], len(values), pointers)
        assert taken == len(values), f"{kernel} takes {taken} arguments, got {len(values)}"

    return work


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.when: float | None = None

    @property
    def is_done(self) -> bool:
        return self.when is not None

    def sync(self) -> None:
        assert self._stream.recording is None, "waited while recording"
        self._stream.run_until(self)

    def __sub__(self, other: Event) -> float:
        assert self.when is not None
        assert other.when is not None
        return 1e3 * (self.when - other.when)


_ONE_GPU = threading.RLock()


class Stream:
    """``queue`` holds work not yet done: ``(kind of node, what to call)``."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.queue: list[tuple[str, Any]] = []
        self.recording: list[tuple[str, Any]] | None = None

    def put(self, kind: str, work: Any) -> None:
        (self.queue if self.recording is None else self.recording).append((kind, work))

    def record(self, options: Any = None) -> Event:
        event = Event(self)
        assert self.recording is None, "an event was recorded into a graph"
        self.put("EventRecord", event)
        return event

    def wait(self, event: Event) -> None:
        assert self.recording is None, "a wait was recorded into a graph"
        self.put("WaitEvent", event)

    def sync(self) -> None:
        self.record().sync()

    def run_until(self, last: Event) -> None:
        with _ONE_GPU:  # several threads may wait
            while not last.is_done:
                kind, work = self.queue.pop(0)
                if kind == "EventRecord":
                    work.when = perf_counter()
                elif kind == "WaitEvent":
                    work._stream.run_until(work)
                else:
                    work()

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Copy:
    def __init__(self, target: int, source: int, nbytes: int, kind: int) -> None:
        self.params = SimpleNamespace(srcPtr=SimpleNamespace(ptr=source), dstPtr=SimpleNamespace(ptr=target), kind=kind)
        self._nbytes = nbytes

    def __call__(self) -> None:
        ctypes.memmove(self.params.dstPtr.ptr, self.params.srcPtr.ptr, self._nbytes)


class Memory:
    """An allocation; it is never given back to the system, so that late work on it does no harm here."""

    def __init__(self, machine: Machine, nbytes: int) -> None:
        raw = np.full(nbytes + 256, 0xCD, np.uint8)  # not zeros: nobody may count on those
        self.handle = raw.ctypes.data + -raw.ctypes.data % 256
        machine.memory.append(raw)


class Machine:
    """The GPU and its driver: all memory, streams and graphs. ``recorded`` counts recordings."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.memory: list[NDArray[np.uint8]] = []
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[tuple[str, Any]]] = {}
        self.recorded = 0
        self.error = 0  # that spoils the context

    def stream(self) -> Stream:
        stream = Stream(4096 + len(self.streams))
        self.streams[stream.handle] = stream
        return stream

    def allocate(self, nbytes: int) -> Memory:
        assert all(stream.recording is None for stream in self.streams.values()), "allocated while recording"
        return Memory(self, nbytes)

    def owns(self, ptr: int) -> bool:
        return any(raw.ctypes.data <= ptr < raw.ctypes.data + raw.nbytes for raw in self.memory)

    def submit(self, stream: int, work: Callable[[], object], kind: str = "Kernel") -> None:
        """Work of an engine on a stream."""
        self.streams[stream].put(kind, work)

    def array(self, shape: tuple[int, ...], dtype: Any, ptr: int | None = None) -> NDArray[Any]:
        """Device memory as numpy sees it, new unless ``ptr`` is given."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = (ctypes.c_uint8 * nbytes).from_address(self.allocate(nbytes).handle if ptr is None else ptr)
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)


_KINDS = ("Kernel", "Memcpy", "Memset", "Host", "Graph", "Empty", "WaitEvent", "EventRecord", "MemAlloc", "MemFree")
NodeType = IntEnum("NodeType", {f"cudaGraphNodeType{kind}": index for index, kind in enumerate(_KINDS)})  # type: ignore[misc]


def _runtime(machine: Machine) -> Any:
    def memcpy(target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:
        machine.streams[stream].put("Memcpy", Copy(target, source, nbytes, kind))
        return (0,)

    def begin(stream: int, _mode: int) -> tuple[int]:
        machine.streams[stream].recording = []
        return (0,)

    def end(stream: int) -> tuple[int, int]:
        nodes = machine.streams[stream].recording
        assert nodes is not None
        machine.streams[stream].recording = None
        machine.recorded += 1
        machine.graphs[machine.recorded] = nodes
        return 0, machine.recorded

    def launch(graph: int, stream: int) -> tuple[int]:
        for kind, work in machine.graphs[graph]:
            machine.streams[stream].put(kind, work)
        return (0,)

    def instantiate(graph: int, _flags: int) -> tuple[int, int]:
        machine.graphs[-graph] = machine.graphs[graph]
        return 0, -graph

    def destroy(graph: int) -> tuple[int]:
        del machine.graphs[graph]
        return (0,)

    def node_type(node: int) -> tuple[int, Any]:
        return 0, NodeType[f"cudaGraphNodeType{machine.graphs[machine.recorded][node][0]}"]

    return SimpleNamespace(
        cudaGetDeviceCount=lambda: (0, 1),
        cudaGetErrorString=lambda code: (0, f"error {code}".encode()),
        cudaGetLastError=lambda: (0,),
        cudaDeviceSynchronize=lambda: (machine.error,),
        cudaMemGetInfo=lambda: (0, 1 << 30, 1 << 31),
        cudaMemcpyAsync=memcpy,
        cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3),
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        cudaStreamBeginCapture=begin,
        cudaStreamEndCapture=end,
        cudaGraphGetNodes=lambda graph, n=0: (0, list(range(n)), len(machine.graphs[graph])),
        cudaGraphNodeGetType=lambda node: (
            0,
            NodeType[f"cudaGraphNodeType{machine.graphs[machine.recorded][node][0]}"],
        ),
        cudaGraphMemcpyNodeGetParams=lambda node: (0, machine.graphs[machine.recorded][node][1].params),
        cudaPointerGetAttributes=lambda ptr: (0, SimpleNamespace(type=machine.owns(ptr))),
        cudaMemoryType=SimpleNamespace(cudaMemoryTypeUnregistered=False),
        cudaGraphInstantiate=instantiate,
        cudaGraphUpload=lambda _graph, _stream: (0,),
        cudaGraphLaunch=launch,
        cudaGraphDestroy=destroy,
        cudaGraphExecDestroy=destroy,
    )


class _View:
    """``StridedMemoryView`` of an array that has ``__cuda_array_interface__``."""

    def __init__(self, array: Any) -> None:
        description = array.__cuda_array_interface__
        self.owner = array
        self.ptr = description["data"][0]
        self.shape = description["shape"]
        self.dtype = np.dtype(description["typestr"])
        self.device_id = 0
        strides = description.get("strides")
        self.strides = None if strides is None else tuple(size // self.dtype.itemsize for size in strides)

    @staticmethod
    def from_any_interface(array: Any, stream_ptr: int) -> _View:
        return _View(array)


def install(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, fatbin: Path) -> Machine:
    """Puts the stand-in where ``import cuda`` finds it. ``fatbin`` is any file: the kernels are in ``library``."""
    from tstitch_engines.device import cuda_kernels

    machine = Machine(library)

    def create_stream(obj: Any = None, options: Any = None) -> Stream:
        return machine.stream() if obj is None else machine.streams[obj.__cuda_stream__()[1]]

    def launch(stream: Stream, config: Any, kernel: str, *arguments: Any) -> None:
        stream.put("Kernel", launch_on_host(library, config, kernel, arguments))

    core: Any = ModuleType("cuda.core")
    core.Device = lambda index: SimpleNamespace(
        set_current=lambda: None,
        compute_capability=(9, 0),
        name="a GPU in host memory",
        create_stream=create_stream,
        allocate=lambda nbytes, stream: machine.allocate(nbytes),
    )
    core.StreamOptions = core.EventOptions = lambda **options: options
    core.LegacyPinnedMemoryResource = lambda: SimpleNamespace(allocate=lambda size, stream: machine.allocate(size))
    core.LaunchConfig = lambda grid, block: SimpleNamespace(grid=grid, block=block)
    core.launch = launch
    core.ObjectCode = SimpleNamespace(from_fatbin=lambda data, name: SimpleNamespace(get_kernel=lambda kernel: kernel))
    utils: Any = ModuleType("cuda.core.utils")
    utils.StridedMemoryView = _View
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = _runtime(machine)
    package: Any = ModuleType("cuda")
    package.core, package.bindings, core.utils = core, bindings, utils
    for module in (package, core, utils, bindings):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    fatbin.write_bytes(b"")
    monkeypatch.setattr(cuda_kernels, "fatbin_path", lambda: fatbin)
    return machine
