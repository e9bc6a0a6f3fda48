"""What can be known of the CUDA device without a GPU: each lack is named, and the fat binary holds the kernels.

The tests marked ``gpu`` compare the CUDA driver with the host driver where there is a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.step_runs import run
from tstitch_engines import _kernels
from tstitch_engines.device import cuda_errors, cuda_graph, cuda_kernels
from tstitch_engines.device.base import ArenaBuffers, Device
from tstitch_engines.device.host import HostDevice
from tstitch_engines.device.open import open_device
from tstitch_engines.device.step_row import HISTORY, ROW_FIELDS
from tstitch_engines.errors import FailedWork, OutOfMemory, Unavailable
from tstitch_engines.make_fatbin import source_folder

KERNELS = {
    "gather_rows",
    "initial_noise",
    "scaled_copy",
    *(f"{part}_{dtype}" for part in ("advance", "guidance_factor") for dtype in ("float32", "float16", "bfloat16")),
    *(f"prepare_{m}_{t}" for m in ("float32", "float16", "bfloat16") for t in ("float32", "int64")),
}


def install_fake_cuda(
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    count: int | None,
    text: str = "",
    driver: int = 0,
    bindings: int = 13050,
) -> None:
    """Stands in for NVIDIA's libraries: a ``cudaGetDeviceCount`` that answers as the real one does on such machines."""
    runtime = SimpleNamespace(
        cudaGetDeviceCount=lambda: (code, count),
        cudaGetErrorString=lambda _: (0, text.encode()),
        cudaDriverGetVersion=lambda: (0, driver),
        cudaRuntimeGetVersion=lambda: (0, bindings),
    )
    names = ("cuda", "cuda.core", "cuda.bindings")
    modules = {name: ModuleType(name) for name in names}
    for module in modules.values():
        module.__path__ = []
    modules["cuda"].core, modules["cuda.bindings"].runtime = modules["cuda.core"], runtime  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(Unavailable, match="cuda:0 needs cuda-core") as caught:
        open_device("cuda")
    assert "tstitch-trt[gpu]" in caught.value.hint


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_cuda(monkeypatch, 35, None, "CUDA driver version is insufficient for CUDA runtime version")
    with pytest.raises(Unavailable, match=r"cuda:1 can't be used: there is no NVIDIA driver \(CUDA error 35") as e:
        open_device("cuda:1")
    assert "install the NVIDIA driver" in e.value.hint


def test_with_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_cuda(monkeypatch, 35, None, "CUDA driver version is insufficient for CUDA runtime version", 12040)
    words = r"the NVIDIA driver is for CUDA 12\.4, and cuda-bindings here wants 13\.5 \(CUDA error 35"
    with pytest.raises(Unavailable, match=words) as e:
        open_device("cuda:1")
    assert "update the NVIDIA driver to 580 or newer" in e.value.hint
    assert "cuda-core[cu12]" in e.value.hint
    install_fake_cuda(monkeypatch, 35, None, "CUDA driver version is insufficient for CUDA runtime version", 11080)
    with pytest.raises(Unavailable, match=r"is for CUDA 11\.8") as e:
        open_device("cuda:1")
    assert "pip install" not in e.value.hint  # of what would be too new too
    install_fake_cuda(monkeypatch, 35, None, "", 13000, bindings=14000)
    with pytest.raises(Unavailable, match=r"is for CUDA 13\.0, and cuda-bindings here wants 14\.0"):
        open_device("cuda:1")


def test_with_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_cuda(monkeypatch, 802, None, "system not yet initialized", 13000)
    with pytest.raises(Unavailable, match=r"cuda:0 can't be used: system not yet initialized \(CUDA error 802") as e:
        open_device("cuda")
    assert "install" not in e.value.hint  # it is there
    assert "tstitch-trt doctor" in e.value.hint


@pytest.mark.parametrize(("count", "listed"), [(0, "none"), (2, "cuda:0, cuda:1")])
def test_without_such_a_device(monkeypatch: pytest.MonkeyPatch, count: int, listed: str) -> None:
    install_fake_cuda(monkeypatch, 0, count)
    with pytest.raises(Unavailable, match=f"no GPU cuda:2; this machine has {listed}"):
        open_device("cuda:2")


def test_with_the_real_cuda_core_and_no_driver() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-core is not installed")
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a CUDA driver")
    words = "there is no NVIDIA driver|the NVIDIA driver is for CUDA"
    with pytest.raises(Unavailable, match=rf"cuda:0 can't be used: ({words}).* \(CUDA error 35\)"):
        open_device("cuda")


def test_the_real_libraries_have_what_is_used() -> None:
    """Names and signatures, which the stand-in of other tests can't vouch for. Needs no driver."""
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-core is not installed")
    from cuda.bindings import driver
    from cuda.core.utils import StridedMemoryView

    for owner, names in {
        core: "Device StreamOptions EventOptions LegacyPinnedMemoryResource LaunchConfig launch",
        core.Device: "set_current compute_capability name create_stream allocate",
        core.Stream: "handle record wait sync __cuda_stream__",
        core.Event: "is_done sync __sub__",
        core.Buffer: "handle from_handle close",
        driver: "cuCtxGetCurrent cuCtxSetCurrent",
        core.ObjectCode: "from_fatbin get_kernel",
        StridedMemoryView: "from_any_interface from_buffer __dlpack__ ptr shape strides dtype device_id",
        runtime: "cudaGetDeviceCount cudaGetErrorString cudaGetLastError cudaMemGetInfo cudaMemcpyAsync "
        "cudaDriverGetVersion cudaRuntimeGetVersion cudaStreamSynchronize "
        "cudaStreamBeginCapture cudaStreamEndCapture cudaGraphGetNodes cudaGraphNodeGetType cudaGraphInstantiate "
        "cudaGraphUpload cudaGraphLaunch cudaGraphDestroy cudaGraphExecDestroy cudaGraphMemcpyNodeGetParams "
        "cudaPointerGetAttributes",
        runtime.cudaMemcpyKind: "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost cudaMemcpyDeviceToDevice",
        runtime.cudaStreamCaptureMode: "cudaStreamCaptureModeThreadLocal",
        runtime.cudaGraphNodeType: " ".join(cuda_graph.REFUSED) + " cudaGraphNodeTypeMemcpy "
        "cudaGraphNodeTypeMemAlloc cudaGraphNodeTypeMemFree",
        runtime.cudaMemcpy3DParms: "srcPtr dstPtr kind",
        runtime.cudaPitchedPtr: "ptr",
        runtime.cudaPointerAttributes: "type",
        runtime.cudaMemoryType: "cudaMemoryTypeUnregistered",
    }.items():
        for name in names.split():
            assert hasattr(owner, name), f"{owner.__name__}.{name}"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = StridedMemoryView.from_dlpack(array, stream_ptr=-1)
    assert (view.ptr, view.shape, view.strides, view.dtype) == (array.ctypes.data, (2, 3), (3, 1), np.float32)
    assert StridedMemoryView.from_dlpack(array.T, stream_ptr=-1).strides == (1, 3)  # in elements
    codes = runtime.cudaError_t
    broken = ("Unsupported", "Invalidated", "Implicit")
    assert [int(getattr(codes, f"cudaErrorStreamCapture{name}")) for name in broken] == list(cuda_graph.BROKEN)
    with pytest.raises(OutOfMemory, match=r"a copy failed: out of memory \(CUDA error 2\)"):
        cuda_errors.check("a copy failed", runtime, (codes.cudaErrorMemoryAllocation,))
    from cuda.core._utils.cuda_utils import CUDAError

    def fail() -> None:
        raise CUDAError("CUDA_ERROR_ILLEGAL_ADDRESS: while executing a kernel\nmore")

    with pytest.raises(FailedWork, match="a wait failed: CUDA_ERROR_ILLEGAL_ADDRESS: while executing a kernel\nhint"):
        cuda_errors.attempt("a wait failed", fail)
    core.StreamOptions(nonblocking=True)
    core.EventOptions(timing_enabled=True)


def test_without_the_fat_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    shutil.copytree(source_folder(), tmp_path / "src")
    monkeypatch.setattr(_kernels, "__file__", str(tmp_path / "_kernels.so"))
    with pytest.raises(Unavailable, match="has no CUDA step kernels") as caught:
        cuda_kernels.load_module((9, 0))
    assert "python -m tstitch_engines.make_fatbin" in caught.value.hint


def test_the_fat_binary_is_there_iff_nvcc_was() -> None:
    path = cuda_kernels.fatbin_path()
    assert path.is_file() == _kernels.HAS_FATBIN
    if _kernels.HAS_FATBIN:
        assert path.read_bytes()[:4] == (0xBA55ED50).to_bytes(4, "little")  # the magic number of fat binaries


@pytest.mark.skipif(not _kernels.HAS_FATBIN, reason="this build has no CUDA kernels")
@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="cuobjdump is not on PATH")
def test_the_fat_binary_holds_every_kernel() -> None:
    def cuobjdump(*arguments: str) -> str:
        command = ["cuobjdump", *arguments, str(cuda_kernels.fatbin_path())]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    found: dict[str, set[str]] = {}
    arch = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+):", line):
            found.setdefault(arch, set()).add(match[1])
    assert "sm_90" in found
    for arch, kernels in found.items():
        assert kernels == KERNELS, arch
    assert re.search(r"compute_\d+|sm_\d+\.ptx", cuobjdump("--list-ptx"))


# ----------------------------------------------------------------------------------------------------------- with a GPU


@pytest.fixture
def cuda() -> Device:
    try:
        return open_device("cuda")
    except Unavailable as error:
        pytest.skip(error.message)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 5, 7)], ids=["vectors", "ragged"])
@pytest.mark.parametrize("timestep", ["float32", "int64"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("guided", [False, True])
def test_cuda_equals_host(cuda: Device, dtype: str, timestep: str, shape: tuple[int, ...], guided: bool) -> None:
    """Up to rounding: the two compilers fuse multiplications and additions differently."""
    got, want = (run(device, dtype, timestep, shape, guided=guided) for device in (cuda, HostDevice()))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3 if dtype == "float16" else 1e-5, atol=2e-5)


@pytest.mark.gpu
def test_cuda_bfloat16_equals_host(cuda: Device) -> None:
    """The bits of the sample may differ by one unit in the last place, so it is left out."""
    got, want = (run(device, "bfloat16", "float32", (4, 16, 16), guided=True) for device in (cuda, HostDevice()))
    for ours, theirs in zip(got[:5], want[:5], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.gpu
def test_cuda_reports_a_fault(cuda: Device) -> None:
    shape = (1, 1, 4, 4)
    zeros = {"latents": shape, "history": (HISTORY, *shape), "rows": (1, 1, len(ROW_FIELDS))}
    arena: dict[str, Any] = {name: cuda.empty(size, "float32") for name, size in zeros.items()}
    for name, size in zeros.items():
        cuda.upload(arena[name], np.full(size, np.nan if name == "latents" else 1, np.float32))
    for name, kind, value in (("step", "int32", 0), ("seed", "int64", 0), ("fault", "int32", -1)):
        arena[name] = cuda.empty((1,), kind)
        cuda.upload(arena[name], np.full(1, value, kind))
    output, active = cuda.empty((1, 1, 4, 4), "float32"), cuda.empty((1,), "int32")
    cuda.upload(output, np.zeros((1, 1, 4, 4), np.float32))
    cuda.upload(active, np.zeros(1, np.int32))
    kernels = cuda.step_kernels(ArenaBuffers(**arena))
    kernels.prepare(active, cuda.empty(shape, "float32"), cuda.empty((1,), "float32"), guided=False)
    kernels.advance(active, output, guided=False, rescale=False)
    np.testing.assert_array_equal(cuda.download(arena["fault"]), 0)


@pytest.mark.gpu
def test_cuda_stopwatch(cuda: Device) -> None:
    watch = cuda.stopwatch()
    for _ in range(3):
        watch.mark()
    assert all(ms >= 0 for ms in watch.milliseconds())
