"""The CUDA driver's source and its Python launches, run on the CPU: see ``cuda_on_host/launch.cpp``."""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.cuda_stand_in import launch_on_host
from support.step_runs import run
from tstitch_engines.device.base import ArenaBuffers, Buffer
from tstitch_engines.device.cuda_kernels import (
    CudaStepKernels,
    Launcher,
    enqueue_gather_rows,
    enqueue_initial_noise,
)
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.host_memory import HostBuffer
from tstitch_engines.device.step_row import (
    FLAG_GIVEN_NOISE,
    FLAG_INPAINT,
    FLAG_LEARNED,
    FLAG_STORE_Y,
    HISTORY,
    ROW,
    ROW_FIELDS,
)
from tstitch_engines.errors import BadInput


class WalkedDevice(HostDevice):
    """Host memory, CUDA kernels: what ``CudaDevice`` gives to ``CudaStepKernels``, with launches that walk the grid."""

    @property
    def _launch(self) -> Launcher:
        return Launcher(None, self.calls, str, self.empty)

    def step_kernels(self, arena: ArenaBuffers, shape: tuple[int, ...] | None = None) -> CudaStepKernels:
        return CudaStepKernels(self._launch, arena, shape)

    def gather_rows(self, active: Buffer, source: Buffer, target: Buffer) -> None:
        enqueue_gather_rows(self._launch, active, source, target)

    def initial_noise(self, latents: Buffer, slot: int, seed: int, scale: float) -> None:
        enqueue_initial_noise(self._launch, latents, slot, seed, scale)


@pytest.fixture
def device(kernels_on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> WalkedDevice:
    def launch(_stream: None, config: Any, kernel: str, *arguments: Any) -> None:
        launch_on_host(kernels_on_host, config, kernel, arguments)()

    core: Any = ModuleType("cuda.core")
    core.launch = launch
    core.LaunchConfig = lambda grid, block: SimpleNamespace(grid=grid, block=block)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    return WalkedDevice()


def compare(got: list[NDArray[Any]], want: list[NDArray[Any]]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(4, 16, 20), (3, 5, 7), (4, 2, 3, 2)], ids=["vectors", "ragged", "video"])
@pytest.mark.parametrize(("dtype", "timestep"), [("float32", "float32"), ("float16", "int64"), ("bfloat16", "int64")])
@pytest.mark.parametrize("guided", [False, True])
def test_cuda_driver_equals_host_driver(
    device: WalkedDevice, dtype: str, timestep: str, shape: tuple[int, ...], guided: bool
) -> None:
    """Latents, history, y, step, fault, timestep; of the sample only float32, a half may round the other way."""
    got, want = (run(one, dtype, timestep, shape, guided=guided) for one in (device, HostDevice()))
    if dtype != "float32":
        del got[5], want[5]
    compare(got, want)


def test_blocks_may_run_in_any_order(device: WalkedDevice, kernels_on_host: ctypes.CDLL) -> None:
    """Lanes of two blocks: no block reads what another one of its launch writes, such as the step."""
    forwards = run(device, "float32", "int64", (4, 16, 20), guided=True)
    order = ctypes.c_int.in_dll(kernels_on_host, "backwards")
    order.value = 1
    try:
        backwards = run(device, "float32", "int64", (4, 16, 20), guided=True)
    finally:
        order.value = 0
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("guided", "launches"), [(False, 2), (True, 3)])
def test_a_step_is_two_launches_and_with_rescale_three(device: WalkedDevice, guided: bool, launches: int) -> None:
    before = device.calls["launch"]
    run(device, "float32", "float32", (1, 2, 2), guided=guided)  # five steps, and the initial noise
    assert device.calls["launch"] - before == 5 * launches + 1


@pytest.mark.parametrize(
    ("shape", "largest"),
    [((4, 6, 10), (4, 8, 10)), ((3, 4, 4), (3, 5, 7)), ((3, 5, 7), (3, 5, 8)), ((3, 5, 7), (3, 7, 9))],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lanes_smaller_than_their_slots(
    device: WalkedDevice, dtype: str, shape: tuple[int, ...], largest: tuple[int, ...]
) -> None:
    """Strides and elements that are multiples of 4 and that are none: against the host driver."""
    got, want = (run(one, dtype, "int64", shape, guided=True, largest=largest) for one in (device, HostDevice()))
    if dtype != "float32":
        del got[5], want[5]
    compare(got, want)


@pytest.mark.parametrize("row", [8, 16, 40, 4096, 16 * 256 + 16, 5000])
@pytest.mark.parametrize("spare", [0, 24])
@pytest.mark.parametrize("halves", [1, 2])
def test_gather_rows_equals_numpy(device: WalkedDevice, row: int, spare: int, halves: int) -> None:
    """Rows of whole sixteens and others, as long as their slots and shorter, on both drivers."""
    rng = np.random.default_rng(row)
    source = HostBuffer((2, 5, row + spare), "uint8")
    source.array[...] = rng.integers(0, 256, source.shape)
    active = HostBuffer((4,), "int32")
    active.array[...] = [3, -1, 0, 4]
    want = source.array[:halves, [3, 3, 0, 4], :row].reshape(4 * halves, row)
    for one in (device, HostDevice()):
        target = HostBuffer((4 * halves, row // 8), "int64")
        one.gather_rows(active, source, target)
        np.testing.assert_array_equal(target.array.view(np.uint8), want)


@pytest.mark.parametrize(
    "target", [((3, 2), "int64"), ((12, 2), "int64"), ((4, 3), "int64"), ((0, 2), "int64"), ((4, 0), "int64")]
)
def test_gather_rows_refuses(device: WalkedDevice, target: tuple[tuple[int, int], str]) -> None:
    """No whole number of halves, more than there are, rows longer than a slot's, none at all."""
    active, source = HostBuffer((4,), "int32"), HostBuffer((2, 5, 16), "uint8")
    active.array[...] = 0
    for one in (device, HostDevice()):
        with pytest.raises(BadInput, match="gather"):
            one.gather_rows(active, source, HostBuffer(*target))


@pytest.mark.parametrize("slots", [[5], [-1, 0], [0, -2]])
def test_the_host_refuses_to_gather_from_no_lane(slots: list[int]) -> None:
    active, target = HostBuffer((len(slots),), "int32"), HostBuffer((len(slots), 2), "int64")
    active.array[...] = slots
    with pytest.raises(BadInput, match="is no lane; allowed is 0 to 4"):
        HostDevice().gather_rows(active, HostBuffer((1, 5, 16), "uint8"), target)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (3, 53, 61), (4, 64, 40)])
def test_rescale_equals_float64(device: WalkedDevice, shape: tuple[int, ...], mean: float) -> None:
    """x' = m std(c) / std(m) to a few units in the last place, of outputs around 0 and a thousand deviations away.

    The sizes are of one thread's four, of some threads', of several runs of all, ragged and not.
    """
    rng = np.random.default_rng(2)
    output = device.empty((4, *shape), "float32")
    output.array[...] = mean + rng.standard_normal(output.shape) * rng.uniform(0.5, 2, (4, 1, 1, 1))
    lanes = device.empty((2, 1, len(ROW_FIELDS)), "float32")
    lanes.array[...] = 0
    for name in ("Q", "B", "RESCALE"):
        lanes.array[..., ROW[name]] = 1
    lanes.array[..., ROW["G"]], lanes.array[..., ROW["GUIDED_CHANNELS"]] = 3, shape[0]
    parts = {
        "latents": ((2, *shape), "float32"), "history": ((HISTORY, 2, *shape), "float32"), "step": ((2,), "int32"),
        "seed": ((2,), "int64"), "fault": ((2,), "int32"),
    }  # fmt: skip
    made = {name: device.empty(size, kind) for name, (size, kind) in parts.items()}
    for part in made.values():
        part.array[...] = 0
    kernels = device.step_kernels(ArenaBuffers(rows=lanes, **made))
    active = device.empty((2,), "int32")
    active.array[...] = [0, 1]
    kernels.prepare(active, device.empty((4, *shape), "float32"), device.empty((4,), "float32"), guided=True)
    kernels.advance(active, output, guided=True, rescale=True)
    cond, uncond = output.array.astype(np.float64).reshape(2, 2, -1)
    m = uncond + 3 * (cond - uncond)
    want = m * (cond.std(axis=1) / m.std(axis=1))[:, None]
    np.testing.assert_allclose(made["latents"].array.reshape(2, -1), want, rtol=2e-6, atol=2e-6)


def arena(device: Any, value: float, rows: int = 1) -> dict[str, HostBuffer]:
    shape = (1, 1, 2, 2)
    kinds = {
        "latents": (shape, "float32", value), "history": ((HISTORY, *shape), "float32", 0),
        "rows": ((1, rows, len(ROW_FIELDS)), "float32", 0.5), "step": ((1,), "int32", 0), "seed": ((1,), "int64", 0),
        "fault": ((1,), "int32", -1), "y": (shape, "float32", 0),
    }  # fmt: skip
    made = {name: device.empty(size, dtype) for name, (size, dtype, _) in kinds.items()}
    for name, (_, _, fill) in kinds.items():
        made[name].array[...] = fill
    made["rows"].array[..., ROW["FLAGS"]] = 0
    return made


def advance(device: WalkedDevice, parts: dict[str, HostBuffer], channels: int = 1) -> None:
    active, output = device.empty((1,), "int32"), device.empty((1, channels, 2, 2), "float32")
    active.array[...] = output.array[...] = 0
    kernels = device.step_kernels(ArenaBuffers(**parts))
    kernels.prepare(active, device.empty((1, 1, 2, 2), "float32"), device.empty((1,), "float32"), guided=False)
    kernels.advance(active, output, guided=False, rescale=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fault(device: WalkedDevice, bad: float) -> None:
    parts = arena(device, bad, rows=2)
    advance(device, parts)
    advance(device, parts)
    assert (parts["fault"].array[0], parts["step"].array[0]) == (0, 2)


def test_a_step_outside_the_table_is_a_fault(device: WalkedDevice) -> None:
    """The host driver refuses such a lane; on CUDA the step is image to the GPU alone."""
    parts = arena(device, 1.0)
    advance(device, parts)
    before = parts["latents"].array.copy()
    advance(device, parts)
    assert parts["fault"].array[0] == 1
    np.testing.assert_array_equal(parts["latents"].array, before)


def test_learned_variance_without_a_second_half_is_a_fault(device: WalkedDevice) -> None:
    parts = arena(device, 1.0)
    parts["rows"].array[..., ROW["FLAGS"]] = FLAG_LEARNED
    advance(device, parts)
    assert parts["fault"].array[0] == 0


@pytest.mark.parametrize(
    ("flags", "y", "given"),
    [
        (FLAG_STORE_Y, 0.0, ()),
        (0, 1.0, ()),
        (FLAG_INPAINT, 0.0, ("image",)),
        (FLAG_INPAINT, 0.0, ("mask",)),
        (FLAG_INPAINT + FLAG_GIVEN_NOISE, 0.0, ("image", "mask")),
    ],
)
def test_a_row_that_uses_memory_which_is_not_there_is_a_fault(
    device: WalkedDevice, flags: int, y: float, given: tuple[str, ...]
) -> None:
    parts = arena(device, 1.0)
    del parts["y"]
    table = parts["rows"].array
    table[..., [ROW[name] for name in ("C", "E", "F", "S", "YY", "YC", "YE", "YF")]] = 0
    table[..., ROW["FLAGS"]], table[..., ROW["Y"]] = flags, y
    more = {name: device.empty((1, 1, 2, 2), "float32") for name in ("y", "image", "mask", "noise")}
    for buffer in more.values():
        buffer.array[...] = 0.5
    advance(device, {**parts, **{name: more[name] for name in given}})
    assert parts["fault"].array[0] == 0
    parts["fault"].array[...], parts["step"].array[...], parts["latents"].array[...] = -1, 0, 1
    advance(device, {**parts, **more})
    assert parts["fault"].array[0] == -1


def test_wrong_buffers_are_refused(device: WalkedDevice) -> None:
    parts = arena(device, 1.0)
    with pytest.raises(BadInput, match=r"model_output is float32\[1, 3, 2, 2\]; allowed is .* \[1, 1, 2, 2\]"):
        advance(device, parts, channels=3)
    with pytest.raises(BadInput, match=r"history is float32\[1, 1, 2, 2\]; allowed is float32 \[3, 1, 1, 2, 2\]"):
        device.step_kernels(ArenaBuffers(**{**parts, "history": parts["latents"]}))
    kernels = device.step_kernels(ArenaBuffers(**parts))
    two, output = device.empty((2,), "int32"), device.empty((2, 1, 2, 2), "float32")
    with pytest.raises(BadInput, match="2 active lanes; allowed is 1 to 1"):
        kernels.advance(two, output, guided=False, rescale=False)
