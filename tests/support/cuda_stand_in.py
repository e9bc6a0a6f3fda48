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

from support.fatbins import MACHINE_CODE, pack_images

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


class CUDAError(Exception):
    """cuda.core's own, which is no public name there either."""


CUDAError.__module__ = "cuda.core._utils.cuda_utils"

_INVALID_CONTEXT, _INVALID_HANDLE = 201, 400
_UNSUPPORTED, _INVALIDATED, _ISOLATION = 900, 901, 905  # cudaErrorStreamCapture...


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.when: float | None = None

    @property
    def is_done(self) -> bool:
        self._stream.machine.check()
        return self.when is not None

    def sync(self) -> None:
        self._stream.machine.check()
        assert self._stream.recording is None or self.when is not None, "waited while recording"
        self._stream.run_until(self)

    def __sub__(self, other: Event) -> float:
        self._stream.machine.check()
        assert self.when is not None
        assert other.when is not None
        return 1e3 * (self.when - other.when)


_ONE_GPU = threading.RLock()


class Stream:
    """``queue`` holds work not yet done: ``(kind of node, what to call)``."""

    def __init__(self, machine: Machine, handle: int, device: int) -> None:
        self.machine = machine
        self.handle = handle
        self.device = device
        self.queue: list[tuple[str, Any]] = []
        self.recording: list[tuple[str, Any]] | None = None
        self.recorder = 0  # the thread that records
        self.broken = False

    def put(self, kind: str, work: Any) -> None:
        """What another thread enqueues while the stream is recorded is recorded too, as on CUDA."""
        if self.recording is not None and self.broken:
            raise CUDAError(f"error {_INVALIDATED}")
        (self.queue if self.recording is None else self.recording).append((kind, work))

    def record(self, event: Event | None = None, options: Any = None) -> Event:
        self.machine.check(self.device)
        event = event or Event(self)
        assert self.recording is None, "an event was recorded into a graph"
        self.put("EventRecord", event)
        return event

    def wait(self, other: Any) -> None:
        """For an event, or for what another stream was given to do so far."""
        self.machine.check()
        if self.recording is not None:
            self.broken = True
            raise CUDAError(f"error {_ISOLATION}")
        if not isinstance(other, Event):
            stream = self.machine.streams[other.__cuda_stream__()[1]]
            other = Event(stream)
            stream.put("EventRecord", other)
        self.put("WaitEvent", other)

    def sync(self) -> None:
        self.machine.check()
        self.drain()

    def drain(self) -> None:
        assert self.recording is None, "waited while recording"
        last = Event(self)
        self.put("EventRecord", last)
        self.run_until(last)

    def run_until(self, last: Event) -> None:
        with _ONE_GPU:  # several threads may wait
            while last.when is None:
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
    """An allocation. When it is given back others may write to it: here 0xDD, in the order of its ``stream``, and at
    once where it has none, as page-locked memory. The system does not get it back, so late work does no other harm."""

    def __init__(self, machine: Machine, nbytes: int, device: int, stream: Stream | None) -> None:
        self._machine = machine
        self._raw = raw = np.full(nbytes + 256, 0xCD, np.uint8)  # not zeros: nobody may count on those
        self._stream = stream
        self.handle = raw.ctypes.data + -raw.ctypes.data % 256
        self.closed = False
        machine.memory.append(raw)
        machine.places[raw.ctypes.data] = device

    def close(self) -> None:
        if not self.closed and not sys.is_finalizing():
            self.closed = True
            raw = self._raw
            if self._stream is None:
                self._machine.early += self._machine.is_copied(raw)
                raw.fill(0xDD)
            else:
                self._stream.put("MemFree", lambda: raw.fill(0xDD))

    __del__ = close


class Machine:
    """The GPUs and their driver: all memory, streams and graphs. ``recorded`` counts recordings.

    Each thread has a current device or none; calls fail without, and most on a stream of another device.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.memory: list[NDArray[np.uint8]] = []
        self.places: dict[int, int] = {}  # on which GPU
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, list[tuple[str, Any]]] = {}
        self.recorded = 0
        self.error = 0  # that spoils the context: every call gives it
        self.early = 0  # how often page-locked memory was freed before a copy from or to it was done
        self._here = threading.local()

    # --- threads and contexts

    @property
    def current(self) -> int | None:
        return getattr(self._here, "device", None)

    @current.setter
    def current(self, device: int | None) -> None:
        self._here.device = device

    def code(self, device: int | None = None) -> int:
        """What a call on this thread gives, for a stream of ``device`` where it matters."""
        if self.error:
            return self.error
        if self.current is None:
            return _INVALID_CONTEXT
        return 0 if device in (None, self.current) else _INVALID_HANDLE

    def check(self, device: int | None = None) -> None:
        if code := self.code(device):
            raise CUDAError(f"error {code}")

    def wait_for_the_device(self) -> int:
        """``cudaDeviceSynchronize`` of any library: it breaks the recordings of all threads on that device."""
        if code := self.code():
            return code
        here = [stream for stream in self.streams.values() if stream.device == self.current]
        recorded = [stream for stream in here if stream.recording is not None]
        for stream in recorded:
            stream.broken = True
        if recorded:
            return _UNSUPPORTED
        for stream in here:
            stream.drain()
        return 0

    # --- what there is

    def stream(self, device: int = 0) -> Stream:
        stream = Stream(self, 4096 + len(self.streams), device)
        self.streams[stream.handle] = stream
        return stream

    def allocate(self, nbytes: int, stream: Stream | None = None, device: int = 0) -> Memory:
        """``stream``: in whose order; without, at once, which a thread that records must not."""
        self.check(None if stream is None else stream.device)
        me = threading.get_ident()
        for each in self.streams.values():
            mine = each is stream if stream is not None else each.recorder == me
            assert each.recording is None or not mine, "allocated while recording"
        return Memory(self, nbytes, device, stream)

    def place(self, ptr: int) -> int | None:
        """The GPU on which an address is allocated."""
        return next(
            (self.places[raw.ctypes.data] for raw in self.memory if 0 <= ptr - raw.ctypes.data < raw.nbytes), None
        )

    def is_copied(self, raw: NDArray[np.uint8]) -> bool:
        """Whether a copy from or to this memory is still to be done."""
        first, last = raw.ctypes.data, raw.ctypes.data + raw.nbytes
        copies = [work for stream in self.streams.values() for _, work in stream.queue if isinstance(work, Copy)]
        return any(first <= end.ptr < last for copy in copies for end in (copy.params.srcPtr, copy.params.dstPtr))

    def submit(self, stream: int, work: Callable[[], object], kind: str = "Kernel") -> None:
        """Work of an engine on a stream."""
        self.check(self.streams[stream].device)
        self.streams[stream].put(kind, work)

    def array(self, shape: tuple[int, ...], dtype: Any, ptr: int | None = None) -> NDArray[Any]:
        """Device memory as numpy sees it, new (and for good) unless ``ptr`` is given."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if ptr is None:
            memory = Memory(self, nbytes, 0, None)
            memory.closed = True
            ptr = memory.handle
        raw = (ctypes.c_uint8 * nbytes).from_address(ptr)
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)


_KINDS = ("Kernel", "Memcpy", "Memset", "Host", "Graph", "Empty", "WaitEvent", "EventRecord", "MemAlloc", "MemFree")
NodeType = IntEnum("NodeType", {f"cudaGraphNodeType{kind}": index for index, kind in enumerate(_KINDS)})  # type: ignore[misc]


def _runtime(machine: Machine) -> Any:
    def memcpy(target: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:
        code = machine.code()  # a copy may be issued to a stream of another device
        if code == 0:
            machine.streams[stream].put("Memcpy", Copy(target, source, nbytes, kind))
        return (code,)

    def begin(stream: int, _mode: int) -> tuple[int]:
        where = machine.streams[stream]
        code = machine.code(where.device)
        if code == 0:
            assert where.recording is None, "two recordings of one stream"
            where.recording, where.recorder = [], threading.get_ident()
        return (code,)

    def end(stream: int) -> tuple[int, int]:
        where = machine.streams[stream]
        nodes, broken = where.recording, where.broken
        assert nodes is not None
        assert where.recorder == threading.get_ident(), "ended by another thread"
        where.recording, where.recorder, where.broken = None, 0, False
        if broken:
            return _INVALIDATED, 0
        machine.recorded += 1
        machine.graphs[machine.recorded] = nodes
        return 0, machine.recorded

    def launch(graph: int, stream: int) -> tuple[int]:
        where = machine.streams[stream]
        code = machine.code(where.device)
        if code == 0:
            for kind, work in machine.graphs[graph]:
                where.put(kind, work)
        return (code,)

    def instantiate(graph: int, _flags: int) -> tuple[int, int]:
        machine.graphs[-graph] = machine.graphs[graph]
        return 0, -graph

    def destroy(graph: int) -> tuple[int]:
        del machine.graphs[graph]
        return (0,)

    def node_type(node: int) -> tuple[int, Any]:
        return 0, NodeType[f"cudaGraphNodeType{machine.graphs[machine.recorded][node][0]}"]

    def wait(stream: int) -> tuple[int]:
        code = machine.code()
        if code == 0:
            machine.streams[stream].drain()
        return (code,)

    return SimpleNamespace(
        cudaGetDeviceCount=lambda: (0, 2),
        cudaGetErrorString=lambda code: (0, f"error {code}".encode()),
        cudaGetLastError=lambda: (0,),
        cudaDeviceSynchronize=lambda: (machine.wait_for_the_device(),),
        cudaStreamSynchronize=wait,
        cudaMemGetInfo=lambda: (machine.code(), (1 << 30) + (machine.current or 0), 1 << 31),
        cudaMemcpyAsync=memcpy,
        cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3),
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        cudaStreamBeginCapture=begin,
        cudaStreamEndCapture=end,
        cudaGraphGetNodes=lambda graph, n=0: (0, list(range(n)), len(machine.graphs[graph])),
        cudaGraphNodeGetType=node_type,
        cudaGraphMemcpyNodeGetParams=lambda node: (0, machine.graphs[machine.recorded][node][1].params),
        cudaPointerGetAttributes=lambda ptr: (0, SimpleNamespace(type=machine.place(ptr) is not None)),
        cudaMemoryType=SimpleNamespace(cudaMemoryTypeUnregistered=False),
        cudaGraphInstantiate=instantiate,
        cudaGraphUpload=lambda _graph, _stream: (0,),
        cudaGraphLaunch=launch,
        cudaGraphDestroy=destroy,
        cudaGraphExecDestroy=destroy,
    )


class _View:
    """``StridedMemoryView`` of an array that has ``__cuda_array_interface__``, or of a ``Buffer`` for another library.

    The other library is the test, which reads through ``machine.array``. ``stream`` waits for the one that the array
    names.
    """

    def __init__(self, machine: Machine, array: Any, stream: int) -> None:
        machine.check()
        description = array.__cuda_array_interface__
        if (producer := description.get("stream")) is not None:
            machine.streams[stream].wait(machine.streams[producer])
        self.owner = array
        self.ptr = description["data"][0]
        self.shape = description["shape"]
        self.dtype = np.dtype(description["typestr"])
        self.device_id = machine.place(self.ptr)
        strides = description.get("strides")
        self.strides = None if strides is None else tuple(size // self.dtype.itemsize for size in strides)


class _Device:
    """``cuda.core.Device``."""

    compute_capability = (9, 0)
    name = "a GPU in host memory"

    def __init__(self, machine: Machine, index: int) -> None:
        self._machine = machine
        self._index = index

    def set_current(self) -> None:
        if self._machine.error:
            raise CUDAError(f"error {self._machine.error}")
        self._machine.current = self._index

    def create_stream(self, obj: Any = None, options: Any = None) -> Stream:
        machine = self._machine
        machine.check(self._index)
        return machine.stream(self._index) if obj is None else machine.streams[obj.__cuda_stream__()[1]]

    def allocate(self, nbytes: int, stream: Stream) -> Memory:
        return self._machine.allocate(nbytes, stream, self._index)


def install(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, fatbin: Path) -> Machine:
    """Puts the stand-in where ``import cuda`` finds it. ``fatbin`` is where one without content
    is put: the kernels are in ``library``.

    The calling thread begins without a current device.
    """
    from tstitch_engines.device import cuda_kernels

    machine = Machine(library)

    def launch(stream: Stream, config: Any, kernel: str, *arguments: Any) -> None:
        machine.check(stream.device)
        stream.put("Kernel", launch_on_host(library, config, kernel, arguments))

    def set_current(device: int) -> tuple[int]:
        machine.current = None if device == 0 else device - 1
        return (0,)

    core: Any = ModuleType("cuda.core")
    core.Device = lambda index: _Device(machine, index)
    core.Buffer = SimpleNamespace(from_handle=lambda ptr, nbytes, owner: SimpleNamespace(ptr=ptr, owner=owner))
    core.StreamOptions = core.EventOptions = lambda **options: options
    core.LegacyPinnedMemoryResource = lambda: SimpleNamespace(allocate=lambda size, stream: machine.allocate(size))
    core.LaunchConfig = lambda grid, block: SimpleNamespace(grid=grid, block=block)
    core.launch = launch
    core.ObjectCode = SimpleNamespace(from_fatbin=lambda data, name: SimpleNamespace(get_kernel=lambda kernel: kernel))
    utils: Any = ModuleType("cuda.core.utils")
    utils.StridedMemoryView = SimpleNamespace(
        from_any_interface=lambda array, stream_ptr: _View(machine, array, stream_ptr),
        from_buffer=lambda memory, shape, dtype: SimpleNamespace(__dlpack__=lambda **_: (memory, shape, dtype)),
    )
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = _runtime(machine)
    bindings.driver = SimpleNamespace(  # a context is its device's number, from 1
        cuCtxGetCurrent=lambda: (0, 0 if machine.current is None else machine.current + 1), cuCtxSetCurrent=set_current
    )
    package: Any = ModuleType("cuda")
    package.core, package.bindings, core.utils = core, bindings, utils
    for module in (package, core, utils, bindings):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    fatbin.write_bytes(pack_images((MACHINE_CODE, (1, 8), 90)))
    monkeypatch.setattr(cuda_kernels, "fatbin_path", lambda: fatbin)
    return machine
