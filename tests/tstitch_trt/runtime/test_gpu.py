"""What only a GPU can show of the run path, on every backend that runs there. Not run on a GPU yet."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import tstitch_trt
from support.compare import relative_error
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.compile.select import default_backend
from tstitch_engines.device.cuda import gpu_and_driver
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadEngine, BadInput, Unavailable
from tstitch_engines.spec import Range
from tstitch_export.build import build
from tstitch_trt import Runtime

pytestmark = pytest.mark.gpu

REQUESTS: list[dict[str, Any]] = [
    {"solver": "ddim", "steps": 10, "guidance": 3.0, "fraction": 0.4},
    {"solver": "ddpm", "steps": 8, "guidance": 2.0, "fraction": 0.5, "variance": "learned"},
    {"solver": "dpmpp-2m", "steps": 12, "guidance": 1.0, "schedule": "large:3,small,large:2"},
    {"solver": "euler", "steps": 10, "guidance": 4.0, "guidance_interval": (2, 6), "guidance_rescale": 0.7},
]


@pytest.fixture(scope="module", params=["onnxruntime", "torch", "torch+compile", "tensorrt", "tensorrt-rtx"])
def bundle(request: pytest.FixtureRequest, tiny_pair: TinyPair) -> Path:
    """The tiny pair with engines of one backend for this GPU."""
    output = tiny_pair.folder / f"gpu-{request.param}.bundle"
    members = {name: tiny_pair.checkpoint(name) for name in ("small", "large")}
    backend, _, option = request.param.partition("+")
    try:
        open_device("cuda")
        build(
            tiny_pair.recipe("small", "large"),
            members=members,
            output=output,
            backend=backend,
            options={option: "default"} if option else {},
            device="cuda",
            profile=Range(1, 4, 8),
        )
    except Unavailable as error:
        pytest.skip(error.message)
    return output


@pytest.fixture
def runtime(bundle: Path) -> Iterator[Runtime]:
    with tstitch_trt.load(bundle, device="cuda") as loaded:
        yield loaded


def torch_cuda() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


def test_an_engine_names_the_gpu_that_it_is_tied_to(bundle: Path) -> None:
    for member in open_bundle(bundle).manifest.members.values():
        (record,) = member.engines
        tied = record.identity.backend == "tensorrt"
        assert (record.identity.gpu, record.driver) == (gpu_and_driver(0) if tied else (msgspec.UNSET, msgspec.UNSET))


def test_kernels_that_were_compiled_here_are_kept_before_anything_is_closed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if default_backend(open_bundle(bundle)) != "tensorrt-rtx":
        pytest.skip("only TensorRT-RTX compiles kernels on loading and keeps them in a file of ours")
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path))
    with tstitch_trt.load(bundle, device="cuda", backend="tensorrt-rtx") as cold:
        cold.sample(n=4, steps=4, fraction=0.5)
        kept = {path: path.read_bytes() for path in (tmp_path / "rtx-kernels").iterdir()}
        assert len(kept) == 2
        assert all(kept.values())
        assert all(cold.jit_ms().values())
    with tstitch_trt.load(bundle, device="cuda", backend="tensorrt-rtx") as warm:
        warm.sample(n=4, steps=4, fraction=0.5)
    assert {path: path.read_bytes() for path in kept} == kept  # nothing was left to compile


def test_a_replay_equals_a_plain_run_bit_for_bit(
    runtime: Runtime, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tstitch_trt.load(bundle, device="cuda", graph="off") as plain, caplog.at_level(logging.WARNING):
        for request in REQUESTS:
            ours, theirs = (one.sample(n=4, seed=5, **request) for one in (runtime, plain))
            np.testing.assert_array_equal(ours.latents, theirs.latents)
    assert plain.device.calls["capture"] == 0
    assert runtime.device.calls["capture"] > 0
    assert not [record for record in caplog.records if "call by call" in record.getMessage()]


def test_whole_segments_equal_steps_bit_for_bit(runtime: Runtime, bundle: Path) -> None:
    with tstitch_trt.load(bundle, device="cuda", graph="segment") as whole:
        for request in REQUESTS:
            ours, theirs = (one.sample(n=4, seed=5, **request) for one in (whole, runtime))
            np.testing.assert_array_equal(ours.latents, theirs.latents)


def test_the_gpu_equals_the_cpu(runtime: Runtime, tiny_pair: TinyPair) -> None:
    """Up to TF32, which CUDA libraries use for float32 matrix products: 10 bits of mantissa, over ten steps."""
    with tstitch_trt.load(tiny_pair.bundle) as cpu:
        for request in REQUESTS:
            ours, theirs = (one.sample(n=3, seed=5, **request).latents for one in (runtime, cpu))
            assert relative_error(ours, theirs) < 3e-2, request


def test_float32_is_float32(runtime: Runtime, tiny_pair: TinyPair) -> None:
    """Without TF32, a step of each member is off by float32's own rounding, whatever the order of summation."""
    if runtime.backend_name.startswith("tensorrt"):
        pytest.skip("TensorRT uses TF32")
    with tstitch_trt.load(tiny_pair.bundle) as cpu:
        for member in runtime.members:
            ours, theirs = (one.sample(n=3, steps=1, schedule=member, guidance=1.0).latents for one in (runtime, cpu))
            assert relative_error(ours, theirs) < 1e-4, member


def test_what_torch_allocates_is_counted(runtime: Runtime) -> None:
    if runtime.backend_name != "torch":
        pytest.skip("only PyTorch tells of its pool")
    runtime.sample(n=4, steps=4)
    before = runtime.memory()["activations"]
    assert before > 0
    for request in REQUESTS:
        runtime.sample(n=1, **request)
    taken = runtime.memory()["activations"]
    for request in REQUESTS:
        runtime.sample(n=1, **request)
    assert runtime.memory()["activations"] == taken


def test_mixed_requests_use_the_same_graphs_and_launch_only(runtime: Runtime) -> None:
    for request in REQUESTS:
        runtime.sample(n=4, **request)
    calls = runtime.device.calls
    recorded = calls["capture"]
    for seed, request in enumerate(REQUESTS):
        before = None
        for event in runtime.iterate(n=3, seed=seed, **{**request, "steps": 7}):
            if before is not None:
                assert calls - before == {"graph launch": 1}, event.step
            before = calls.copy()
    assert calls["capture"] == recorded


def test_latents_are_exchanged_with_torch_without_a_copy(runtime: Runtime, bundle: Path) -> None:
    torch = torch_cuda()
    noise = torch.randn(11, 4, 8, 8, device="cuda")
    ours = runtime.sample(latents=noise, steps=5, output="device")
    shared = torch.from_dlpack(ours.device_latents)
    assert shared.data_ptr() == ours.device_latents.__cuda_array_interface__["data"][0]
    assert torch.as_tensor(ours.device_latents, device="cuda").data_ptr() == shared.data_ptr()
    theirs = runtime.sample(latents=noise.cpu().numpy(), steps=5)
    kept = shared.clone()
    np.testing.assert_array_equal(kept.cpu().numpy(), theirs.latents)

    stream = torch.cuda.Stream()
    with tstitch_trt.load(bundle, device="cuda", stream=stream.cuda_stream) as same:
        with torch.cuda.stream(stream):
            late = torch.zeros_like(noise)
            for _ in range(200):  # still being made when it is given away
                late += noise / 200
            latents = same.sample(latents=late, steps=5).latents
        expected = runtime.sample(latents=late.cpu().numpy(), steps=5).latents
        np.testing.assert_array_equal(latents, expected)


def test_two_streams_at_once(bundle: Path) -> None:
    """Two runtimes in two threads, each with its stream, draw what each draws alone."""
    request: dict[str, Any] = {"n": 8, "steps": 20, "fraction": 0.5, "solver": "ddpm"}
    with tstitch_trt.load(bundle, device="cuda") as alone:
        want = [alone.sample(seed=seed, **request).latents for seed in (1, 100)]
    got: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def draw(index: int) -> None:
        with tstitch_trt.load(bundle, device="cuda") as runtime:
            ready.wait()
            got[index] = [runtime.sample(seed=(1, 100)[index], **request).latents for _ in range(10)]

    ready = threading.Barrier(2)
    threads = [threading.Thread(target=draw, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(got[index]) == 10
        for latents in got[index]:
            np.testing.assert_array_equal(latents, want[index])


def test_a_thousand_trajectories_take_no_more_memory(runtime: Runtime) -> None:
    from cuda.bindings import runtime as cudart

    def work(count: int) -> int:
        for index in range(count):
            runtime.sample(n=1 + index % 11, seed=index, steps=4, fraction=0.5)
        return int(cudart.cudaMemGetInfo()[1])

    before = work(50)
    allocated = runtime.device.calls["alloc"]
    after = work(1000)
    assert runtime.device.calls["alloc"] == allocated
    assert before - after < 4 << 20  # what other programs do meanwhile counts too


def test_a_bundle_from_the_cpu_is_rebuilt_for_this_gpu_and_stays_one_for_the_cpu(
    tiny_pair: TinyPair, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_pair.bundle, tmp_path / "copy.bundle"))
    options: dict[str, Any] = {"device": "cuda", "backend": "onnxruntime"}
    try:
        with pytest.raises(BadEngine, match=r"arch is .* in the bundle and sm_"):
            tstitch_trt.load(copy, **options)
        tstitch_trt.load(copy, **options, rebuild=True).close()
    except Unavailable as error:
        pytest.skip(error.message)
    for member in open_bundle(copy).manifest.members.values():
        assert [record.identity.arch.startswith("sm_") for record in member.engines] == [False, True]
    with pytest.raises(BadInput, match="threads = 0 can't be honoured"):
        tstitch_trt.load(copy, **options, threads=0)
    latents = []
    for device in ("cpu", "cuda"):
        with tstitch_trt.load(copy, device=device, backend="onnxruntime") as runtime:
            latents.append(runtime.sample(labels=[1, 2], seed=3, steps=6, decode=False).latents)
    np.testing.assert_allclose(latents[1], latents[0], rtol=2e-3, atol=2e-3)
