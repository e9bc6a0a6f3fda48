"""The calls that loading and running make, over a library that stands in for TensorRT and notes them.

No engine runs here: what is proved is which calls are made with what, that each refusal becomes an error, and who
holds which memory. That the calls exist is proved against the real bindings (``test_tensorrt_api``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tensorrt_stand import Place, Stand, buffers, opened
from tstitch_engines.backends.tensorrt import engine as module
from tstitch_engines.backends.tensorrt.flavour import RTX, TENSORRT, Flavour
from tstitch_engines.errors import BadEngine, BadInput, FailedWork, OutOfProfile
from tstitch_engines.spec import Range


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "gpu_and_driver", lambda index: ("a GPU", "13000"))
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
    assert engine.capturable
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
        ("infer_shapes", FailedWork, "does not know the shapes of labels"),
        ("get_tensor_shape", BadEngine, r"gives model_output of shape \[9\]"),
        ("set_tensor_address", FailedWork, "refuses the address of sample"),
        ("update_device_memory_size_for_shapes", FailedWork, "wants 8192 bytes of scratch and said 4096"),
    ],
)
def test_a_refusal_while_binding(call: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    stand.refuse.add(call)
    with pytest.raises(kind, match=words):
        engine.bind(buffers(place, 2), batch=2)
    with pytest.raises(BadInput, match="no buffers"):
        engine.enqueue()


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


def test_a_refusal_while_running(tmp_path: Path) -> None:
    stand, place = Stand(RTX), Place()
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    stand.refuse.add("execute_async_v3")
    with pytest.raises(FailedWork, match=r"could not start small.plan"):
        engine.enqueue()


def test_what_can_t_be_captured_says_so(tmp_path: Path) -> None:
    stand, place = Stand(RTX), Place()
    stand.refuse.add("is_stream_capturable")
    engine = opened(stand, place, tmp_path)
    engine.bind(buffers(place, 2), batch=2)
    assert not engine.capturable


def test_a_plan_of_another_profile(tmp_path: Path) -> None:
    with pytest.raises(BadEngine, match=r"takes sample of the sizes .*wanted are"):
        opened(Stand(RTX, batch=Range(1, 1, 1)), Place(), tmp_path)


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
