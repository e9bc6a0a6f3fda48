"""The calls that loading and running make, over a library that stands in for TensorRT and notes them.

No engine runs here: what is proved is which calls are made with what, that each refusal becomes an error, and who
holds which memory. That the calls exist is proved against the real bindings (``test_tensorrt_api``).
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensorrt_builds import shipped_small
from tstitch_engines.backends.tensorrt import engine as module
from tstitch_engines.backends.tensorrt.engine import TensorRtEngine
from tstitch_engines.backends.tensorrt.flavour import RTX, TENSORRT, Flavour
from tstitch_engines.device import Buffer, open_device
from tstitch_engines.errors import BadEngine, BadInput, FailedWork, OutOfProfile
from tstitch_engines.manifest import SCHEMA, EngineIdentity
from tstitch_engines.spec import Range, ShapeProfile

PROFILE = ShapeProfile({"B": Range(1, 2, 4)})


class DataType(Enum):
    FLOAT = 0
    INT64 = 8


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class Place:
    """A CUDA device in name; its memory is the host's."""

    name = "cuda:0"
    stream_handle = 77

    def __init__(self) -> None:
        self._host = open_device("cpu")
        self.allocated: list[int] = []

    def activate(self) -> None:
        return

    def synchronize(self) -> None:
        return

    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        buffer = self._host.empty(shape, dtype)
        self.allocated.append(buffer.nbytes)
        return buffer


class Stand:
    """One library. ``refuse``: calls that report failure; ``calls``: what contexts were told."""

    def __init__(self, flavour: Flavour, scratch: int = 4096, batch: Range = PROFILE.dims["B"]) -> None:
        self.refuse: set[str] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.scratch = scratch
        self.kernels = b"compiled"
        self.given: list[bytes] = []
        self.settings: Any = None
        member, _ = shipped_small()
        specs = {spec.name: spec for spec in (*member.inputs, *member.outputs)}
        stand = self

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

        class IExecutionContext:
            def __getattr__(self, name: str) -> Any:
                def call(*args: Any) -> Any:
                    stand.calls.append((name, *args))
                    if name == "infer_shapes":
                        return ["labels"] if name in stand.refuse else []
                    if name == "get_tensor_shape":
                        shape = next(c[2] for c in reversed(stand.calls) if c[:2] == ("set_input_shape", "sample"))
                        return (9,) if name in stand.refuse else shape
                    if name == "update_device_memory_size_for_shapes":
                        return stand.scratch * (2 if name in stand.refuse else 1)
                    return name not in stand.refuse

                return call

        if flavour is RTX:
            IExecutionContext.is_stream_capturable = (  # type: ignore[attr-defined]
                lambda self, stream: "is_stream_capturable" not in stand.refuse
            )

        class Kernels:
            def deserialize(self, blob: bytes) -> bool:
                stand.given.append(blob)
                return "deserialize" not in stand.refuse

            def serialize(self) -> bytes:
                return stand.kernels

        class IRuntimeConfig:
            def set_execution_context_allocation_strategy(self, strategy: str) -> None:
                self.strategy = strategy

            if flavour is RTX:

                def create_runtime_cache(self) -> Kernels:
                    return Kernels()

                def set_runtime_cache(self, cache: Kernels) -> None:
                    self.cache = cache

        class ICudaEngine:
            device_memory_size_v2 = scratch
            num_io_tensors = len(specs)

            def get_tensor_name(self, index: int) -> str:
                return list(specs)[index]

            def get_tensor_mode(self, name: str) -> Mode:
                return Mode.OUTPUT if specs[name] in member.outputs else Mode.INPUT

            def get_tensor_dtype(self, name: str) -> DataType:
                return {"float32": DataType.FLOAT, "int64": DataType.INT64}[specs[name].dtype]

            def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
                return [specs[name].resolve({"B": size}) for size in (batch.min, batch.opt, batch.max)]

            def create_runtime_config(self) -> IRuntimeConfig:
                stand.settings = IRuntimeConfig()
                return stand.settings

            def create_execution_context(self, how: Any) -> IExecutionContext | None:
                assert how is stand.settings
                return None if "create_execution_context" in stand.refuse else IExecutionContext()

        class Runtime:
            def __init__(self, logger: Any) -> None:
                return

            def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine:
                return ICudaEngine()

            if flavour is RTX:

                def get_engine_validity(self, header: bytes) -> tuple[str, int]:
                    return "VALID", 0

        flags = ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME",
                 "INSUFFICIENT_GPU_MEMORY", "MALFORMED_ENGINE", "CUDA_ERROR")  # fmt: skip
        self.library: Any = SimpleNamespace(
            __version__="1.7.1.116",
            ILogger=ILogger,
            DataType=DataType,
            TensorIOMode=Mode,
            ICudaEngine=ICudaEngine,
            IRuntimeConfig=IRuntimeConfig,
            IExecutionContext=IExecutionContext,
            Runtime=Runtime,
            ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
            CudaGraphStrategy=SimpleNamespace(DISABLED="disabled"),
            EngineInvalidityDiagnostics=SimpleNamespace(**{name: 1 << bit for bit, name in enumerate(flags)}),
        )


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "gpu_and_driver", lambda index: ("a GPU", "13000"))
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))


def opened(
    stand: Stand, place: Place, tmp_path: Path, flavour: Flavour = RTX, name: str = "small", **options: Any
) -> TensorRtEngine:
    path = tmp_path / f"{name}.plan"
    path.write_bytes(name.encode())
    member, _ = shipped_small()
    identity = EngineIdentity(
        schema=SCHEMA,
        backend=flavour.name,
        backend_version=stand.library.__version__,
        onnx_sha256="0" * 64,
        precision="fp32",
        profile=PROFILE,
        arch="sm_89",
        options=options,
    )
    device: Any = place
    return TensorRtEngine(flavour, stand.library, path, member, identity, device)


def buffers(place: Place, batch: int) -> dict[str, Buffer]:
    member, _ = shipped_small()
    made = {s.name: place.empty(s.resolve({"B": batch}), s.dtype) for s in (*member.inputs, *member.outputs)}
    place.allocated.clear()
    return made


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
        ("create_execution_context", FailedWork, "makes no execution context"),
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
