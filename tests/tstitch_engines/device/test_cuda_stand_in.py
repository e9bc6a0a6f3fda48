"""``CudaDevice`` over streams that are as late as they can be: copies, order, recording, other libraries' arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.cuda_stand_in import Machine, install
from support.step_runs import run
from tstitch_engines.device.base import NotCaptured
from tstitch_engines.device.cuda import BESIDE, CudaDevice
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.open import open_device
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
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate memory")

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

    def copy(address: int) -> None:
        runtime.cudaMemcpyAsync(
            target.ptr, address, 16, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.stream_handle
        )

    cuda.capture(lambda: cuda.copy(target, source)).close()
    cuda.capture(lambda: copy(source.ptr)).close()  # as if pinned: CUDA knows it
    with pytest.raises(NotCaptured, match="a copy from or to ordinary host memory"):
        cuda.capture(lambda: copy(ordinary.ctypes.data))


def test_an_interrupted_recording_is_ended(cuda: CudaDevice, machine: Machine) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.capture(interrupted)
    assert machine.streams[cuda.stream_handle].recording is None


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


def test_shared_arrays_name_their_memory(cuda: CudaDevice, machine: Machine) -> None:
    buffer = cuda.empty((2, 3), "float16")
    shared = cuda.share(buffer)
    description = shared.__cuda_array_interface__
    assert (description["shape"], description["typestr"], description["data"][0]) == ((2, 3), "<f2", buffer.ptr)
    assert shared.__dlpack_device__() == (2, 0)
    again = cuda.borrow(shared)
    assert again is not None
    assert again.ptr == buffer.ptr
