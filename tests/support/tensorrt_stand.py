"""A library that stands in for TensorRT and notes what loading and running tell it. No engine runs.

As the real one it reports failures by its logger and by ``False``, ``None`` or 0, and two by ``RuntimeError``
(``pyCore.cpp`` of NVIDIA/TensorRT). TensorRT-RTX's contexts can be
captured once they have run.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.tensorrt_builds import shipped_small
from tstitch_engines.backends.tensorrt.engine import TensorRtEngine
from tstitch_engines.backends.tensorrt.flavour import RTX, Flavour
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity
from tstitch_engines.device.base import Buffer
from tstitch_engines.device.open import open_device
from tstitch_engines.spec import Range, ShapeProfile

__all__ = ["PROFILE", "Place", "Stand", "buffers", "loaded", "opened"]

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

    def free_memory(self) -> int:
        return 3 << 20

    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        buffer = self._host.empty(shape, dtype)
        self.allocated.append(buffer.nbytes)
        return buffer


class Stand:
    """One library. ``refuse``: calls that report failure; ``calls``: what contexts were told."""

    def __init__(self, flavour: Flavour, scratch: int = 4096, batch: Range = PROFILE.dims["B"]) -> None:
        self.refuse: set[str] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.says = ""  # the library's own words when it refuses something
        self.logger: Any = None
        self.needs: int | None = None  # scratch of a context, where that is not what the engine said
        self.plan: Any = None
        self.scratch = scratch
        self.kernels = b"compiled"
        self.given: list[bytes] = []
        self.settings: Any = None
        self.information = '{"Layers": []}'  # the inspector's JSON
        self.invalid: str | None = None  # what is said of every plan's header
        member, _ = shipped_small()
        specs = {spec.name: spec for spec in (*member.inputs, *member.outputs)}
        stand = self

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

        def refused(name: str) -> bool:
            if name in stand.refuse and stand.says:
                stand.logger.log(ILogger.ERROR, stand.says)
            return name in stand.refuse

        class IExecutionContext:
            ran = False

            def __getattr__(self, name: str) -> Any:
                def call(*args: Any) -> Any:
                    stand.calls.append((name, *args))
                    if name == "set_optimization_profile_async" and refused(name):
                        raise RuntimeError("Error in set optimization profile async.")
                    if name == "infer_shapes":
                        if refused("infer_shapes fails"):
                            raise RuntimeError("infer_shapes error code: -1")
                        return ["labels"] if name in stand.refuse else []
                    if name == "get_tensor_shape":
                        shape = next(c[2] for c in reversed(stand.calls) if c[:2] == ("set_input_shape", "sample"))
                        return (9,) if name in stand.refuse else shape
                    if name == "update_device_memory_size_for_shapes":
                        wanted = stand.scratch if stand.needs is None else stand.needs
                        return 0 if refused(name) else wanted
                    if name == "execute_async_v3":
                        self.ran = True
                    return None if refused(name) or name == "set_device_memory" else True

                return call

        if flavour is RTX:
            IExecutionContext.is_stream_capturable = (  # type: ignore[attr-defined]
                lambda self, stream: self.ran and "is_stream_capturable" not in stand.refuse
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

                def set_runtime_cache(self, cache: Kernels) -> bool:
                    self.cache = cache
                    return "set_runtime_cache" not in stand.refuse

        class ICudaEngine:
            device_memory_size_v2 = scratch
            streamable_weights_size = 1 << 20

            def __setattr__(self, name: str, value: int) -> None:
                assert name == "weight_streaming_budget_v2"
                refused(name)

            num_io_tensors = len(specs)

            def get_tensor_name(self, index: int) -> str:
                return list(specs)[index]

            def get_tensor_mode(self, name: str) -> Mode:
                return Mode.OUTPUT if specs[name] in member.outputs else Mode.INPUT

            def get_tensor_dtype(self, name: str) -> DataType:
                return {"float32": DataType.FLOAT, "int64": DataType.INT64}[specs[name].dtype]

            def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
                return [specs[name].resolve({"B": size}) for size in (batch.min, batch.opt, batch.max)]

            def create_engine_inspector(self) -> SimpleNamespace:
                return SimpleNamespace(get_engine_information=lambda form: {"json": stand.information}[form])

            def create_runtime_config(self) -> IRuntimeConfig:
                stand.settings = IRuntimeConfig()
                return stand.settings

            def create_execution_context(self, how: Any) -> IExecutionContext | None:
                assert how is stand.settings
                return None if "create_execution_context" in stand.refuse else IExecutionContext()

        class Runtime:
            def __init__(self, logger: Any) -> None:
                stand.logger = logger

            def deserialize_cuda_engine(self, plan: Any) -> ICudaEngine | None:
                with memoryview(plan) as content:
                    assert content.readonly
                    stand.plan = bytes(content[:16])
                return None if refused("deserialize_cuda_engine") else ICudaEngine()

            if flavour is RTX:

                def get_engine_validity(self, header: bytes) -> tuple[str, int]:
                    return ("VALID", 0) if stand.invalid is None else ("INVALID", 1 << flags.index(stand.invalid))

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
            ComputeCapability=Enum("ComputeCapability", {"NONE": 0, "SM86": 86, "SM89": 89, "SM120": 120}),
            LayerInformationFormat=SimpleNamespace(JSON="json"),
            EngineInvalidityDiagnostics=SimpleNamespace(**{name: 1 << bit for bit, name in enumerate(flags)}),
        )


def opened(
    stand: Stand, place: Place, tmp_path: Path, flavour: Flavour = RTX, name: str = "small", **options: Any
) -> TensorRtEngine:
    path = tmp_path / f"{name}.plan"
    path.write_bytes(name.encode())
    return loaded(stand, place, path, flavour, **options)


def loaded(stand: Stand, place: Place, path: Path, flavour: Flavour = RTX, **options: Any) -> TensorRtEngine:
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
