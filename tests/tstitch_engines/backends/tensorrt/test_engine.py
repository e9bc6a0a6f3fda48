"""The calls that loading and running make, over a library that stands in for TensorRT and notes them.

No engine runs here: what is proved is which calls are made with what, that each refusal becomes an error, and who
holds which memory. That the calls exist is proved against the real bindings (``test_tensorrt_api``).
"""

from __future__ import annotations

import os
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest

from support.recordings import others_may_record
from support.tensorrt_stand import Place, Stand, buffers, loaded, opened
from tstitch_engines.backends.tensorrt import engine as module
from tstitch_engines.backends.tensorrt.flavour import RTX, TENSORRT, Flavour
from tstitch_engines.device import cuda
from tstitch_engines.errors import BadEngine, BadInput, FailedWork, OutOfProfile, Unavailable
from tstitch_engines.spec import Range


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for place in (module, cuda):
        monkeypatch.setattr(place, "gpu_and_driver", lambda index: ("a GPU", "13000"))
    monkeypatch.setattr(cuda, "compute_capability", lambda index: (8, 9))
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("flavour", [RTX, TENSORRT])
def test_binding_tells_a_context_everything_and_running_is_one_call(flavour: Flavour, tmp_path: Path) -> None:
    stand, place = Stand(flavour), Place()
    engine = opened(stand, place, tmp_path, flavour)
    assert stand.settings.strategy == "ours"
    assert getattr(stand.settings, "cuda_graph_strategy", None) == ("disabled" if flavour is RTX else None)
    own = buffers(place, 3)
    engine.bind(own, batch=3)
    (block,) = engine.scratch().items()
    assert stand.calls[0] == ("set_optimization_profile_async", 0, 77)
    for name, buffer in own.items():
        assert ("set_tensor_address", name, buffer.ptr) in stand.calls
    assert ("set_input_shape", "sample", (3, 1, 28, 28)) in stand.calls
    assert stand.calls[-1] == ("set_device_memory", *block)
    engine.enqueue()
    assert engine.obstacle == ""
    stand.calls.clear()
    place.allocated.clear()
    engine.enqueue()
    assert stand.calls == [("execute_async_v3", 77)]
    assert place.allocated == []


def test_every_set_of_buffers_keeps_its_context(tmp_path: Path) -> None:
    """What was recorded with one set is valid after another was bound: nothing of the first is touched again."""
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    first, second = buffers(place, 2), buffers(place, 2)
    engine.bind(first, batch=2)
    engine.bind(second, batch=2)
    engine.bind(buffers(place, 4), batch=4)
    assert sum(call[0] == "set_optimization_profile_async" for call in stand.calls) == 3
    stand.calls.clear()
    engine.bind(first, batch=2)
    assert stand.calls == []
    with pytest.raises(OutOfProfile):
        engine.bind(buffers(place, 5), batch=5)


def test_nobody_records_while_weights_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(Stand(RTX), Place(), tmp_path, refit=True)
    seen: list[bool] = []
    monkeypatch.setattr(type(engine), "_refit", lambda *_: seen.append(others_may_record()))
    engine.refit({}, {})
    assert seen == [False]
    assert others_may_record()


def test_a_context_is_let_go_of_and_made_again(tmp_path: Path) -> None:
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    first, second = buffers(place, 2), buffers(place, 2)
    engine.bind(first, batch=2)
    engine.bind(second, batch=2)
    engine.release(first, sizes={"B": 2})
    stand.calls.clear()
    engine.bind(second, batch=2)
    assert stand.calls == []  # the other one stays
    engine.bind(first, batch=2)
    assert sum(call[0] == "set_optimization_profile_async" for call in stand.calls) == 1
    engine.release(first, sizes={"B": 2})
    engine.release(first, sizes={"B": 2})  # there is none any more
    with pytest.raises(BadInput, match="no buffers"):
        engine.enqueue()


def test_engines_share_one_block_of_the_largest_size(tmp_path: Path) -> None:
    place = Place()
    engines = [
        opened(Stand(RTX, scratch=size), place, tmp_path, name=f"e{size}") for size in (1 << 12, 1 << 16, 1 << 14)
    ]
    for engine in engines:
        engine.bind(buffers(place, 1), batch=1)
    blocks = {address: size for engine in engines for address, size in engine.scratch().items()}
    assert list(blocks.values()) == [1 << 16]
    alone = opened(Stand(RTX, scratch=1 << 15), place, tmp_path, name="alone", **{"private-scratch": True})
    assert list(alone.scratch().values()) == [1 << 15]
    assert not set(alone.scratch()) & set(blocks)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ("create_execution_context", FailedWork, r"makes no execution context .*cuda:0 has 3.0 MiB free"),
        ("set_optimization_profile_async", FailedWork, "refuses its profile"),
        ("set_input_shape", FailedWork, r"refuses sample of shape \[2, 1, 28, 28\]"),
        ("infer_shapes fails", FailedWork, "can't tell the shapes .*in words"),
        ("infer_shapes", FailedWork, "does not know the shapes of labels"),
        ("get_tensor_shape", BadEngine, r"gives model_output of shape \[9\]"),
        ("set_tensor_address", FailedWork, "refuses the address of sample"),
        ("update_device_memory_size_for_shapes", FailedWork, "can't tell how much scratch memory it needs .*in words"),
        ("set_device_memory", FailedWork, "refuses 4096 bytes of scratch memory .*in words"),
    ],
)
def test_a_refusal_while_binding(call: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    stand.refuse.add(call)
    stand.says = "in words"
    with pytest.raises(kind, match=words):
        engine.bind(buffers(place, 2), batch=2)
    with pytest.raises(BadInput, match="no buffers"):
        engine.enqueue()


def test_weights_that_can_t_be_streamed(tmp_path: Path) -> None:
    stand = Stand(TENSORRT)
    engine = opened(stand, Place(), tmp_path, TENSORRT, **{"weight-streaming": True})
    assert engine.obstacle == "small.plan streams weights (weight-streaming), which allocates while it runs"
    stand.refuse.add("weight_streaming_budget_v2")
    stand.says = "in words"
    with pytest.raises(FailedWork, match=r"refuses to stream half of the weights for small.plan: in words"):
        opened(stand, Place(), tmp_path, TENSORRT, **{"weight-streaming": True})


@pytest.mark.parametrize(
    ("flavour", "invalid", "says", "kind", "words", "hint"),
    [
        (RTX, "VERSION_MISMATCH", "", BadEngine, "it was compiled by another version", "compile it again"),
        (RTX, "UNSUPPORTED_CC", "", BadEngine, "it is for other GPUs", "compile it again"),
        (RTX, "OLD_CUDA_DRIVER", "", BadEngine, "the NVIDIA driver is too old", "update the NVIDIA driver"),
        (RTX, "OLD_CUDA_RUNTIME", "", BadEngine, "the CUDA runtime is too old", "cuda-core"),
        (RTX, "MALFORMED_ENGINE", "", BadEngine, "the file is damaged", "compile it again"),
        (RTX, "CUDA_ERROR", "", BadEngine, "CUDA does not start", "tstitch-trt doctor"),
        (RTX, None, "magic tag does not match", BadEngine, "it refuses it .*magic tag", "compile it again"),
        (RTX, "INSUFFICIENT_GPU_MEMORY", "", FailedWork, "no room for the weights of .*, of 3.0 MiB", "nvidia-smi"),
        (TENSORRT, None, "Error Code 2: OutOfMemory (Requested size was 7 bytes.)", FailedWork,
         r"small.plan: 0.0 MiB, of 3.0 MiB free \(.*was 7 bytes", "weight-streaming"),
    ],
)  # fmt: skip
def test_a_plan_that_is_refused_on_loading(
    flavour: Flavour, invalid: str | None, says: str, kind: type[Exception], words: str, hint: str, tmp_path: Path
) -> None:
    stand = Stand(flavour)
    stand.refuse.add("deserialize_cuda_engine")
    stand.invalid, stand.says = invalid, says
    with pytest.raises(kind, match=words) as caught:
        opened(stand, Place(), tmp_path, flavour)
    assert hint in str(getattr(caught.value, "hint", ""))


def test_a_gpu_that_the_library_does_not_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for the library's own list may be tried there. To compile a refused one again would not help."""
    monkeypatch.setattr(cuda, "compute_capability", lambda index: (9, 0))
    stand = Stand(RTX)
    opened(stand, Place(), tmp_path).close()
    stand.refuse.add("deserialize_cuda_engine")
    stand.invalid = "UNSUPPORTED_CC"
    with pytest.raises(Unavailable, match=r"does not support cuda:0 \(a GPU, compute capability 9.0\); .* 8.6, 8.9"):
        opened(stand, Place(), tmp_path)


def test_a_refusal_while_running(tmp_path: Path) -> None:
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    stand.refuse.add("execute_async_v3")
    stand.says = "Error Code 1: in words"
    with pytest.raises(FailedWork, match=r"could not start small.plan: Error Code 1: in words"):
        engine.enqueue()


def test_what_can_t_be_captured_says_so_once_it_has_run(tmp_path: Path) -> None:
    """TensorRT-RTX answers for a context as it is: one that has not run may have kernels to compile."""
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    assert "TensorRT-RTX 1.7.1.116 says that small.plan is not stream-capturable" in engine.obstacle
    engine.enqueue()
    assert engine.obstacle == ""
    stand.refuse.add("is_stream_capturable")
    assert "small.plan" in engine.obstacle


def test_sizes_that_want_more_scratch_than_the_engine_said(tmp_path: Path) -> None:
    """They get a larger block; a context of before, and what was recorded with it, keeps the one it has."""
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    first, second = buffers(place, 2), buffers(place, 2)
    engine.bind(first, batch=2)
    (small,) = engine.scratch().items()
    stand.needs = 3 * stand.scratch
    engine.bind(second, batch=2)
    assert stand.calls[-1][0] == "set_device_memory"
    large = stand.calls[-1][1:]
    assert large[1] == 3 * stand.scratch
    assert engine.scratch() == dict([small, large])
    engine.release(first, sizes={"B": 2})
    assert engine.scratch() == dict([large])


def test_sizes_that_need_no_scratch(tmp_path: Path) -> None:
    """0 means an error only where one was said. Such a context gets the block all the same: an engine wants one."""
    stand, place = Stand(RTX), Place()
    stand.needs = 0
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    assert stand.calls[-1] == ("set_device_memory", *next(iter(engine.scratch().items())))


def test_a_plan_is_not_read_into_memory(tmp_path: Path) -> None:
    stand, size = Stand(RTX), 64 << 20
    path = tmp_path / "large.plan"
    path.write_bytes(b"large")
    os.truncate(path, size)
    tracemalloc.start()
    try:
        loaded(stand, Place(), path)
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()
    assert stand.plan == b"large".ljust(16, b"\0")
    for content in (b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadEngine, match=r"large.plan can't be read"):
            loaded(stand, Place(), path)


def test_closing_lets_go_of_everything_when_the_gpu_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    context = weakref.ref(engine._contexts[next(iter(engine._contexts))].context)

    def lost() -> None:
        raise FailedWork("the GPU is lost", hint="start again")

    monkeypatch.setattr(place, "synchronize", lost)
    with pytest.raises(FailedWork, match="the GPU is lost"):
        engine.close()
    assert context() is None
    engine.close()


def test_a_plan_of_another_profile(tmp_path: Path) -> None:
    with pytest.raises(BadEngine, match=r"takes sample of the sizes .*wanted are"):
        opened(Stand(RTX, batch=Range(1, 1, 1)), Place(), tmp_path)


def test_what_tensorrt_rtx_compiles_on_the_gpu_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a context and its first run, without the work that was waited for; TensorRT compiles nothing there."""
    now = 0.0
    for flavour, cost in ((RTX, 110.0), (TENSORRT, 0.0)):
        stand, place = Stand(flavour), Place()
        engine = opened(stand, place, tmp_path, flavour)
        make, start = stand.library.ICudaEngine.create_execution_context, stand.library.IExecutionContext.__getattr__

        def advance(milliseconds: float) -> None:
            nonlocal now
            now += milliseconds / 1e3

        def making(self: Any, how: Any, make: Any = make) -> Any:
            advance(100)
            return make(self, how)

        def starting(self: Any, name: str, start: Any = start) -> Any:
            if name == "execute_async_v3":
                advance(10)
            return start(self, name)

        monkeypatch.setattr(stand.library.ICudaEngine, "create_execution_context", making)
        monkeypatch.setattr(stand.library.IExecutionContext, "__getattr__", starting)
        monkeypatch.setattr(module, "perf_counter", lambda: now)
        waits = [0.0, 1000.0]  # for the work before the context is made, and after
        monkeypatch.setattr(place, "synchronize", lambda waits=waits: advance(waits.pop()))
        own = buffers(place, 2)
        engine.bind(own, batch=2)
        for _ in range(3):
            engine.enqueue()
        engine.bind(own, batch=2)
        engine.enqueue()
        assert engine.jit_ms == pytest.approx(cost)


def test_what_would_break_another_thread_s_recording_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, making a context, its first run and freeing; a later run takes no lock."""
    held: list[bool] = []
    seen: list[tuple[str, bool]] = []

    class Lock:
        def __enter__(self) -> None:
            held.append(True)

        def __exit__(self, *_: object) -> None:
            held.pop()

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)
        note = lambda *args: seen.append((args[1] if name == "__getattr__" else name, bool(held)))  # noqa: E731
        monkeypatch.setattr(owner, name, lambda *args: (note(*args), call(*args))[1])

    monkeypatch.setattr(module, "RECORDING", Lock())
    stand, place = Stand(RTX), Place()
    watch(stand.library.Runtime, "deserialize_cuda_engine")
    watch(stand.library.ICudaEngine, "create_execution_context")
    watch(stand.library.IExecutionContext, "__getattr__")
    engine = opened(stand, place, tmp_path)
    own = [buffers(place, 2), buffers(place, 2)]
    for one in own:
        engine.bind(one, batch=2)
        weakref.finalize(engine._bound.context, lambda: seen.append(("freed", bool(held))))  # type: ignore[union-attr]
        engine.enqueue()
        engine.enqueue()
    engine.release(own[0], sizes={"B": 2})
    engine.close()
    told = {name: [lock for at, lock in seen if at == name] for name, _ in seen}
    assert told["deserialize_cuda_engine"] == [True]
    assert told["create_execution_context"] == told["freed"] == [True, True]
    assert told["execute_async_v3"] == [True, False] * 2


def test_compiled_kernels_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    """They are saved after a context's first run, and not again while it runs on."""
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    engine.enqueue()
    (kept,) = (tmp_path / "cache" / "rtx-kernels").iterdir()
    assert kept.read_bytes() == b"compiled"
    stand.kernels = b"compiled in the background"
    engine.enqueue()
    assert kept.read_bytes() == b"compiled"
    stand.kernels = b"of two sizes"
    engine.bind(buffers(place, 1), batch=1)
    engine.enqueue()
    assert kept.read_bytes() == b"of two sizes"


def test_a_library_that_takes_no_kernel_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stand, place = Stand(RTX), Place()
    stand.refuse.add("set_runtime_cache")
    engine = opened(stand, place, tmp_path)
    assert "takes no kernel cache" in caplog.text
    engine.bind(buffers(place, 2), batch=2)
    engine.enqueue()
    engine.close()
    assert not (tmp_path / "cache" / "rtx-kernels").exists()


def test_compiled_kernels_are_kept_for_the_next_load(tmp_path: Path) -> None:
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    engine.close()
    engine.close()
    (kept,) = (tmp_path / "cache" / "rtx-kernels").iterdir()
    assert kept.read_bytes() == b"compiled"
    again = opened(stand, place, tmp_path)
    assert stand.given == [b"compiled"]
    stand.kernels = b"more of them"
    again.bind(buffers(place, 1), batch=1)
    again.close()
    assert kept.read_bytes() == b"more of them"
    # One that the library refuses is replaced.
    stand.refuse.add("deserialize")
    third = opened(stand, place, tmp_path)
    third.bind(buffers(place, 1), batch=1)
    third.close()
    assert kept.read_bytes() == b"more of them"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
