"""``CudaDevice`` over streams that are as late as they can be: copies, order, recording, other libraries' arrays."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.cuda_stand_in import CUDAError, Machine, install
from support.step_runs import run
from tstitch_engines.device.base import NotCaptured
from tstitch_engines.device.cuda import BESIDE, CudaDevice
from tstitch_engines.device.cuda_stream import CudaStream
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.open import device_kept, open_device
from tstitch_engines.device.slab import Slab
from tstitch_engines.errors import BadInput, FailedWork


@pytest.fixture
def machine(kernels_on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return install(monkeypatch, kernels_on_host, tmp_path / "step_kernels.fatbin")


@pytest.fixture
def cuda(machine: Machine) -> CudaDevice:
    device = open_device("cuda")
    assert isinstance(device, CudaDevice)
    return device


def in_a_thread(work: Callable[[], object]) -> None:
    """A new one, which has no current device."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.parametrize("size", [5, BESIDE // 4 + 3], ids=["small", "large"])
def test_copies_keep_their_order(cuda: CudaDevice, size: int) -> None:
    """Each array is read back as it was when the copy was asked for, whatever is written afterwards."""
    first, second = np.arange(size, dtype=np.float32), np.full(size, 7, np.float32)
    buffer, other = cuda.empty((size,), "float32"), cuda.empty((size,), "float32")
    cuda.upload(buffer, first)
    early = cuda.download_later(buffer)
    cuda.copy(other, buffer)
    source = second.copy()
    cuda.upload(buffer, source)
    source[:] = -1  # may be reused at once
    late = cuda.download_later(buffer)
    np.testing.assert_array_equal(cuda.download(buffer), second)
    np.testing.assert_array_equal(late.get(), second)
    np.testing.assert_array_equal(early.get(), first)
    np.testing.assert_array_equal(cuda.download(other), first)


def test_memory_is_used_again(cuda: CudaDevice, machine: Machine) -> None:
    buffer, values = cuda.empty((BESIDE,), "float32"), np.zeros(BESIDE, np.float32)
    for _ in range(3):
        cuda.upload(buffer, values)
        cuda.download_later(buffer).get()
    held = len(machine.memory)
    for _ in range(20):
        cuda.upload(buffer, values)
        cuda.download_later(buffer).get()
    assert len(machine.memory) == held


def test_too_little_memory_is_said_in_bytes(cuda: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(nbytes: int, stream: object) -> None:
        raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate memory")

    monkeypatch.setattr(cuda._device, "allocate", full)
    with pytest.raises(FailedWork, match=r"no room for float32\[256, 1024\]: 1.0 MiB, of 1024.0 MiB free") as caught:
        cuda.empty((256, 1024), "float32")
    assert "smaller batch" in caught.value.hint
    monkeypatch.setattr(cuda._device, "allocate", lambda nbytes, stream: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cuda.empty((4,), "float32")


def test_work_beside_waits_for_nothing_of_the_other(cuda: CudaDevice, machine: Machine) -> None:
    other = cuda.with_own_stream()
    assert other.name == cuda.name
    assert other.stream_handle != cuda.stream_handle
    done: list[int] = []
    machine.submit(cuda.stream_handle, lambda: done.append(1))
    buffer, values = other.empty((100,), "float32"), np.arange(100, dtype=np.float32)
    other.upload(buffer, values)
    np.testing.assert_array_equal(other.download(buffer), values)
    assert done == []
    assert cuda.calls["download"] == 1  # counted together
    cuda.synchronize()
    assert done == [1]
    assert HostDevice().with_own_stream().name == "cpu"


def test_step_kernels_over_late_streams(cuda: CudaDevice) -> None:
    for ours, theirs in zip(
        *(run(device, "float32", "float32", (4, 5, 7), guided=True) for device in (cuda, HostDevice())), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_slices_share_one_aligned_block(machine: Machine, name: str) -> None:
    device = open_device(name)
    before = device.calls["alloc"]
    slab = Slab(device, {"a": 10, "b": 300, "c": 4})
    wide, narrow, last = (
        slab.view("b", (75,), "float32"),
        slab.view("b", (3,), "float32"),
        slab.view("c", (1,), "int32"),
    )
    assert device.calls["alloc"] - before == 1
    assert wide.ptr == narrow.ptr
    assert all(view.ptr % 256 == 0 for view in (wide, last))
    device.upload(wide, np.arange(75, dtype=np.float32))
    device.upload(last, np.array([9], np.int32))
    np.testing.assert_array_equal(device.download(narrow), [0, 1, 2])
    np.testing.assert_array_equal(device.download(wide), np.arange(75))


def test_a_graph_does_its_work_at_each_launch_only(cuda: CudaDevice, machine: Machine) -> None:
    source, target = cuda.empty((4,), "float32"), cuda.empty((4,), "float32")
    cuda.upload(source, np.ones(4, np.float32))
    cuda.upload(target, np.zeros(4, np.float32))
    before = cuda.calls.copy()
    graph = cuda.capture(lambda: cuda.scaled_copy(target, source, 3.0))
    assert cuda.calls - before == {"capture": 1}
    np.testing.assert_array_equal(cuda.download(target), 0)
    for value in (1, 2):
        cuda.upload(source, np.full(4, value, np.float32))
        graph.launch()
        np.testing.assert_array_equal(cuda.download(target), 3 * value)
    graph.close()
    graph.close()


def test_what_must_not_be_replayed_is_refused(cuda: CudaDevice, machine: Machine) -> None:
    def host_function() -> None:
        machine.submit(cuda.stream_handle, lambda: None, kind="Host")

    def broken() -> None:
        machine.submit(cuda.stream_handle, lambda: None)
        raise RuntimeError("no kernel for this\nsecond line")

    with pytest.raises(NotCaptured, match="a call of a host function"):
        cuda.capture(host_function)
    with pytest.raises(NotCaptured, match="holds 1 allocations and 0 releases of memory"):
        cuda.capture(lambda: machine.submit(cuda.stream_handle, lambda: None, kind="MemAlloc"))
    with pytest.raises(NotCaptured, match="is empty: the work went to another stream"):
        cuda.capture(lambda: None)
    with pytest.raises(NotCaptured, match="RuntimeError: no kernel for this\nhint"):
        cuda.capture(broken)
    assert machine.graphs == {}
    buffer = cuda.empty((2,), "int32")  # the stream works as before
    cuda.upload(buffer, np.array([4, 5], np.int32))
    np.testing.assert_array_equal(cuda.download(buffer), [4, 5])


def test_memory_of_the_graphs_own_is_fine(cuda: CudaDevice, machine: Machine) -> None:
    """cuBLAS takes and gives back its workspace so."""

    def product() -> None:
        for kind in ("MemAlloc", "Kernel", "MemFree"):
            machine.submit(cuda.stream_handle, lambda: None, kind=kind)

    graph = cuda.capture(product)
    assert graph.nodes == 3
    graph.close()


def test_copies_are_recorded_between_memory_that_stays(cuda: CudaDevice) -> None:
    from cuda.bindings import runtime

    source, target, ordinary = cuda.empty((4,), "float32"), cuda.empty((4,), "float32"), np.zeros(4, np.float32)

    def copy(address: int, *, down: bool = False) -> None:
        kind = getattr(runtime.cudaMemcpyKind, "cudaMemcpyDeviceToHost" if down else "cudaMemcpyHostToDevice")
        ends = (address, target.ptr) if down else (target.ptr, address)
        runtime.cudaMemcpyAsync(*ends, 16, kind, cuda.stream_handle)

    cuda.capture(lambda: cuda.copy(target, source)).close()
    cuda.capture(lambda: copy(source.ptr)).close()  # as if pinned: CUDA knows it
    with pytest.raises(NotCaptured, match="a copy from or to ordinary host memory"):
        cuda.capture(lambda: copy(ordinary.ctypes.data))
    cuda.capture(lambda: copy(ordinary.ctypes.data), uploads=True).close()  # its owner keeps it
    with pytest.raises(NotCaptured, match="a copy from or to ordinary host memory"):
        cuda.capture(lambda: copy(ordinary.ctypes.data, down=True), uploads=True)


def test_an_interrupted_recording_is_ended(cuda: CudaDevice, machine: Machine) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.capture(interrupted)
    assert machine.streams[cuda.stream_handle].recording is None


def test_a_recording_that_another_thread_broke_is_made_again(cuda: CudaDevice, machine: Machine) -> None:
    source, target = cuda.empty((4,), "float32"), cuda.empty((4,), "float32")
    cuda.upload(source, np.ones(4, np.float32))
    cuda.synchronize()
    codes: list[int] = []

    def wait_for_the_device() -> None:
        machine.current = 0
        codes.append(machine.wait_for_the_device())

    def work(broken: int) -> None:
        cuda.scaled_copy(target, source, 3.0)
        if len(codes) < broken:
            in_a_thread(wait_for_the_device)
        cuda.scaled_copy(target, target, 2.0)  # fails in a broken recording

    graph = cuda.capture(lambda: work(2))
    assert codes == [900, 900]  # the other thread's call fails too
    assert machine.recorded == 1
    graph.launch()
    np.testing.assert_array_equal(cuda.download(target), 6)
    graph.close()
    with pytest.raises(NotCaptured, match=r"the work can't be recorded: FailedWork.*error 901"):
        cuda.capture(lambda: work(99))
    assert len(codes) == 5  # three times, not for ever
    assert machine.graphs == {}
    np.testing.assert_array_equal(cuda.download(source), 1)  # the stream works as before


def test_recordings_are_made_one_after_another(cuda: CudaDevice) -> None:
    """The collector that one switched off is not switched on by another that ends in the meantime."""
    other = cuda.with_own_stream()
    begun, ended = Event(), Event()
    seen: list[bool] = []
    buffers = [device.empty((4,), "float32") for device in (cuda, other)]

    def second() -> None:
        other.activate()

        def work() -> None:
            begun.set()
            ended.wait(5)
            seen.append(gc.isenabled())
            other.copy(buffers[1], buffers[1])

        other.capture(work).close()

    thread = Thread(target=second)

    def first() -> None:
        thread.start()
        begun.wait(0.3)
        cuda.copy(buffers[0], buffers[0])

    assert gc.isenabled()
    cuda.capture(first).close()
    ended.set()
    thread.join(10)
    assert seen == [False]
    assert gc.isenabled()


def test_memory_dropped_by_another_thread_is_no_part_of_a_recording(cuda: CudaDevice, machine: Machine) -> None:
    held = [cuda.empty((4,), "float32"), cuda.empty((4,), "float32")]
    view = machine.array((4,), np.uint32, held[1].ptr)

    def work() -> None:
        cuda.copy(held[0], held[0])
        in_a_thread(lambda: held.pop())

    graph = cuda.capture(work)
    assert graph.nodes == 1
    graph.close()
    cuda.synchronize()
    assert (view == 0xDDDDDDDD).all(), "it was freed afterwards"


def test_a_graph_that_nobody_closed_is_freed(cuda: CudaDevice, machine: Machine) -> None:
    buffer = cuda.empty((4,), "float32")
    graph = cuda.capture(lambda: cuda.copy(buffer, buffer))
    graph.launch()
    assert machine.graphs
    del graph
    assert machine.graphs == {}
    cuda.synchronize()


@pytest.mark.parametrize("size", [5, BESIDE // 4 + 3], ids=["small", "large"])
def test_a_download_that_nobody_reads(cuda: CudaDevice, machine: Machine, size: int) -> None:
    """Its page-locked memory is neither freed nor used again before the copy is done, and then used again."""
    buffer = cuda.empty((size,), "float32")
    cuda.upload(buffer, np.ones(size, np.float32))
    cuda.synchronize()
    del (later := [cuda.download_later(buffer)])[:]
    assert later == []
    cuda.upload(buffer, np.full(size, 7, np.float32))
    np.testing.assert_array_equal(cuda.download(buffer), 7)
    cuda.synchronize()
    held = len(machine.memory)
    cuda.download_later(buffer)
    cuda.synchronize()
    cuda.download_later(buffer)
    assert len(machine.memory) == held
    assert machine.early == 0


@pytest.mark.parametrize("size", [5, BESIDE // 4 + 3], ids=["small", "large"])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("way", ["upload", "download_later"])
def test_a_copy_that_ctrl_c_interrupts(
    cuda: CudaDevice, machine: Machine, monkeypatch: pytest.MonkeyPatch, way: str, copies: int, size: int
) -> None:
    """Between the copy and the event behind it: what it copies through is freed after it."""
    buffer, values = cuda.empty((size,), "float32"), np.ones(size, np.float32)
    cuda.upload(buffer, values)
    cuda.download_later(buffer).get()
    copy, left = CudaStream.copy, [copies]

    def interrupted(stream: CudaStream, target: int, source: int, nbytes: int, kind: str) -> None:
        copy(stream, target, source, nbytes, kind)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CudaStream, "copy", interrupted)
        with suppress(KeyboardInterrupt):
            cuda.upload(buffer, values) if way == "upload" else cuda.download_later(buffer)
            cuda.synchronize()
    gc.collect()
    assert machine.early == 0
    np.testing.assert_array_equal(cuda.download(buffer), 1)


def test_a_device_that_is_dropped_in_the_middle(machine: Machine) -> None:
    """Memory of copies under way is freed after them."""
    cuda = open_device("cuda")
    buffer = cuda.empty((BESIDE,), "float32")
    cuda.upload(buffer, np.ones(BESIDE, np.float32))
    cuda.download_later(buffer)
    gone = weakref.ref(cuda)
    del cuda
    assert gone() is None, "the collector is not needed"
    assert machine.early == 0


def test_errors_of_cuda_are_ours(cuda: CudaDevice, machine: Machine) -> None:
    """From every call, with a hint; and nothing of another library's own errors is hidden."""
    buffer, values = cuda.empty((4,), "float32"), np.zeros(4, np.float32)
    tensor = Tensor(machine, values)
    cuda.upload(buffer, values)
    graph, watch, later = cuda.capture(lambda: cuda.copy(buffer, buffer)), cuda.stopwatch(), cuda.download_later(buffer)
    watch.mark()
    calls: dict[str, Callable[[], object]] = {
        "activate": cuda.activate,
        "empty": lambda: cuda.empty((4,), "float32"),
        "upload": lambda: cuda.upload(buffer, values),
        "download": lambda: cuda.download(buffer),
        "download_later": lambda: cuda.download_later(buffer),
        "get": later.get,
        "copy": lambda: cuda.copy(buffer, buffer),
        "synchronize": cuda.synchronize,
        "capture": lambda: cuda.capture(lambda: None),
        "launch": graph.launch,
        "kernel": lambda: cuda.scaled_copy(buffer, buffer, 1.0),
        "mark": watch.mark,
        "milliseconds": watch.milliseconds,
        "with_own_stream": cuda.with_own_stream,
        "borrow": lambda: cuda.borrow(tensor),
        "free_memory": cuda.free_memory,
    }
    machine.error = 719
    for name, call in calls.items():
        with pytest.raises(FailedWork, match="error 719") as caught:
            call()
        assert caught.value.hint, name
    assert "error 719" in str(cuda.lost())
    graph.close()
    machine.error = 0
    assert cuda.lost() is None
    np.testing.assert_array_equal(later.get(), 0)


def test_any_thread_may_ask_for_what_was_taken_along(machine: Machine) -> None:
    """Downloads, times, free memory and whether the device is lost: where no or another device is the current one."""
    first, second = open_device("cuda:0"), open_device("cuda:1")
    assert machine.current == 1
    assert isinstance(first, CudaDevice)
    first.activate()
    buffer = first.empty((4,), "float32")
    first.upload(buffer, np.ones(4, np.float32))

    def ask(current: int | None) -> None:
        first.activate()
        watch, later = first.stopwatch(), first.download_later(buffer)
        watch.mark()
        watch.mark()
        questions: list[Callable[[], object]] = [
            later.get, watch.milliseconds, first.free_memory, first.lost, first.synchronize
        ]  # fmt: skip
        for question in questions:
            machine.current = current
            answer = question()
            assert machine.current == (current or 0)
            assert question != first.lost or answer is None
            assert question != first.free_memory or answer == 1 << 30, "that of the first"

    for current in (1, None):
        in_a_thread(lambda current=current: ask(current))
    del second


@pytest.mark.parametrize(("had", "has"), [(0, 0), (1, 1), (None, 1)])
def test_opening_a_device_may_leave_a_thread_its_own(machine: Machine, had: int | None, has: int) -> None:
    machine.current = had
    with device_kept("cuda:1"):
        open_device("cuda:1")
        assert machine.current == 1
    assert machine.current == has
    with device_kept("cpu"):
        open_device("cpu")
    assert machine.current == has


@pytest.mark.parametrize("current", [1, None])
def test_finalisers_leave_a_threads_device_as_it_was(machine: Machine, current: int | None) -> None:
    cuda = open_device("cuda")
    buffer = cuda.empty((BESIDE,), "float32")
    cuda.upload(buffer, np.ones(BESIDE, np.float32))
    graph = cuda.capture(lambda: cuda.copy(buffer, buffer))
    dropped: list[Any] = [cuda.download_later(buffer), cuda.share(buffer), graph, buffer, cuda]
    dropped[1].__dlpack__(stream=machine.stream().handle)
    graph = buffer = cuda = None

    def drop() -> None:
        machine.current = current
        dropped.clear()
        assert machine.current == current

    in_a_thread(drop)
    assert machine.graphs == {}
    assert machine.early == 0


@pytest.mark.parametrize("told", ["its stream", "nothing: the legacy default stream"])
def test_shared_memory_is_used_again_after_its_readers(cuda: CudaDevice, machine: Machine, told: str) -> None:
    """The reader, as PyTorch does, enqueues work and lets go of the array at once."""
    reader = machine.stream()
    machine.streams[1] = machine.streams[reader.handle]
    values, seen = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    buffer = cuda.empty((4,), "float32")
    cuda.upload(buffer, values)
    cuda.synchronize()
    shared = cuda.share(cuda.view(buffer, 0, (4,), "float32"))
    shared.__dlpack__(**({"stream": reader.handle} if told == "its stream" else {}))
    lying = machine.array((4,), np.float32, buffer.ptr)
    machine.submit(reader.handle, lambda: np.copyto(seen, lying))
    del shared, buffer
    cuda.synchronize()  # others have the memory now
    assert not np.array_equal(lying, values)
    np.testing.assert_array_equal(seen, values)


def test_a_callers_stream(machine: Machine) -> None:
    stream = machine.stream()
    for given in (stream, stream.handle):
        device = open_device("cuda", stream=given)
        assert isinstance(device, CudaDevice)
        assert device.stream_handle == stream.handle
    for bad, words in ((0, "legacy default stream"), (2, "default stream"), ("main", "is no CUDA stream")):
        with pytest.raises(BadInput, match=words):
            open_device("cuda", stream=bad)
    with pytest.raises(BadInput, match="given for the device cpu"):
        open_device("cpu", stream=stream)


class Tensor:
    """Someone else's array in device memory."""

    def __init__(self, machine: Machine, values: Any, strides: tuple[int, ...] | None = None, device: int = 0) -> None:
        memory = machine.array(values.shape, values.dtype)
        memory[...] = values
        self.place = (2, device)
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (memory.ctypes.data, False),
            "version": 3,
            "strides": strides,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place


def test_arrays_of_others_are_read_where_they_lie(cuda: CudaDevice, machine: Machine) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = Tensor(machine, values)
    buffer = cuda.borrow(tensor)
    assert buffer is not None
    assert buffer.ptr == tensor.__cuda_array_interface__["data"][0]
    assert (buffer.shape, buffer.dtype) == ((2, 3), "float32")
    np.testing.assert_array_equal(cuda.download(buffer), values)
    assert cuda.borrow(values) is None
    assert cuda.borrow(Tensor(machine, values, strides=(12, 4))) is not None

    with pytest.raises(BadInput, match=r"strides \[1, 2\] is not contiguous"):
        cuda.borrow(Tensor(machine, values, strides=(4, 8)))
    with pytest.raises(BadInput, match="on cuda:1; this runtime is on cuda:0"):
        cuda.borrow(Tensor(machine, values, device=1))
    with pytest.raises(BadInput, match="of float64; allowed are float32"):
        cuda.borrow(Tensor(machine, values.astype(np.float64)))
    with pytest.raises(BadInput, match="DLPack device type 10"):
        cuda.borrow(SimpleNamespace(__dlpack_device__=lambda: (10, 0)))
    with pytest.raises(BadInput, match="in GPU memory was given to a runtime on cpu"):
        HostDevice().borrow(tensor)


def test_an_array_that_is_borrowed_during_a_recording_waits_for_its_end(cuda: CudaDevice, machine: Machine) -> None:
    """By another thread, as a server makes requests while it records steps."""
    tensor, producer = Tensor(machine, np.zeros(4, np.float32)), machine.stream()
    tensor.__cuda_array_interface__["stream"] = producer.handle
    values = machine.array((4,), np.float32, tensor.__cuda_array_interface__["data"][0])
    machine.submit(producer.handle, lambda: values.fill(5))
    target = cuda.empty((4,), "float32")
    borrowed: list[Any] = []

    def borrow() -> None:
        cuda.activate()
        borrowed.append(cuda.borrow(tensor))

    other = Thread(target=borrow)

    def work() -> None:
        cuda.copy(target, target)
        other.start()
        other.join(0.1)
        cuda.copy(target, target)

    cuda.capture(work).close()
    other.join(10)
    cuda.copy(target, borrowed[0])
    np.testing.assert_array_equal(cuda.download(target), 5)


def test_shared_arrays_name_their_memory(cuda: CudaDevice, machine: Machine) -> None:
    buffer = cuda.empty((2, 3), "float16")
    shared = cuda.share(buffer)
    description = shared.__cuda_array_interface__
    assert (description["shape"], description["typestr"], description["data"][0]) == ((2, 3), "<f2", buffer.ptr)
    assert shared.__dlpack_device__() == (2, 0)
    again = cuda.borrow(shared)
    assert again is not None
    assert again.ptr == buffer.ptr
