"""The part of TensorRT's Python API that is used, as types: mypy lets nothing else through.

Tests compare the names with the bindings of every supported version and the signatures with the type stubs of TensorRT
10.13 (11 and TensorRT-RTX have none). Names in ``PROBED`` are missing in some versions: ask ``has`` first.

Failures come back as ``False``, ``None`` or -1, not as exceptions: every such result is checked where it is got.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from tstitch_engines.backends.tensorrt import enums

__all__ = [
    "PROBED",
    "AttentionOutput",
    "Config",
    "Context",
    "CudaEngine",
    "Inspector",
    "Layer",
    "Library",
    "Network",
    "NetworkBuilder",
    "Parser",
    "PlanRuntime",
    "RuntimeCache",
    "RuntimeConfig",
    "Softmax",
    "Tensor",
    "WeightRefitter",
    "has",
]


class Tensor(Protocol):
    name: str

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> Any: ...


class Layer(Protocol):
    @property
    def type(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def num_inputs(self) -> int: ...
    def get_input(self, index: int) -> Tensor | None: ...
    def get_output(self, index: int) -> Tensor: ...
    def set_input(self, index: int, tensor: Tensor) -> None: ...


class Softmax(Protocol):
    axes: int


class Attention(Protocol):
    decomposable: bool

    def get_input(self, index: int) -> Tensor: ...
    def set_input(self, index: int, tensor: Tensor) -> Any: ...


class AttentionOutput(Protocol):
    @property
    def attention(self) -> Attention: ...


class Network(Protocol):
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    def get_input(self, index: int) -> Tensor: ...
    def get_output(self, index: int) -> Tensor: ...
    def get_layer(self, index: int) -> Layer: ...
    def add_cast(self, tensor: Tensor, to_type: Any) -> Layer: ...
    def add_reduce(self, tensor: Tensor, op: Any, axes: int, keep_dims: bool) -> Layer: ...
    def add_elementwise(self, first: Tensor, second: Tensor, op: Any) -> Layer: ...


class Profile(Protocol):
    def set_shape(self, name: str, low: tuple[int, ...], best: tuple[int, ...], high: tuple[int, ...]) -> None: ...


class TimingCache(Protocol):
    def serialize(self) -> Any: ...
    def combine(self, input_cache: TimingCache, ignore_mismatch: bool) -> bool: ...


class Config(Protocol):
    builder_optimization_level: int
    tiling_optimization_level: Any
    hardware_compatibility_level: Any
    max_aux_streams: int
    num_compute_capabilities: int
    profiling_verbosity: Any
    progress_monitor: Any

    def set_flag(self, flag: Any) -> None: ...
    def clear_flag(self, flag: Any) -> None: ...
    def set_memory_pool_limit(self, pool: Any, nbytes: int) -> None: ...
    def add_optimization_profile(self, profile: Profile) -> int: ...
    def create_timing_cache(self, blob: bytes) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...
    def set_compute_capability(self, capability: Any, index: int) -> bool: ...


class NetworkBuilder(Protocol):
    def create_network(self, flags: int) -> Network | None: ...
    def create_builder_config(self) -> Config | None: ...
    def create_optimization_profile(self) -> Profile | None: ...
    def build_serialized_network(self, network: Network, config: Config) -> Any: ...
    def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> bool: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node_operator(self) -> str: ...
    def node_name(self) -> str: ...


class Parser(Protocol):
    @property
    def num_errors(self) -> int: ...
    def parse_from_file(self, path: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class RuntimeCache(Protocol):
    def deserialize(self, blob: bytes) -> bool: ...
    def serialize(self) -> Any: ...


class RuntimeConfig(Protocol):
    cuda_graph_strategy: Any
    dynamic_shapes_kernel_specialization_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...
    def create_runtime_cache(self) -> RuntimeCache | None: ...
    def set_runtime_cache(self, cache: RuntimeCache) -> Any: ...


class Context(Protocol):
    def set_optimization_profile_async(self, index: int, stream: int) -> bool: ...
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def get_tensor_shape(self, name: str) -> Any: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, address: int, nbytes: int) -> None: ...
    def execute_async_v3(self, stream: int) -> bool: ...
    def is_stream_capturable(self, stream: int) -> bool: ...


class Inspector(Protocol):
    def get_engine_information(self, format: Any) -> str: ...  # noqa: A002 - TensorRT's name


class CudaEngine(Protocol):
    weight_streaming_budget_v2: int

    @property
    def num_io_tensors(self) -> int: ...
    @property
    def device_memory_size_v2(self) -> int: ...
    @property
    def streamable_weights_size(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]: ...
    def create_engine_inspector(self) -> Inspector | None: ...
    def create_runtime_config(self) -> RuntimeConfig | None: ...
    def create_execution_context(self, how: Any) -> Context | None: ...


class PlanRuntime(Protocol):
    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, plan: Any) -> CudaEngine | None: ...
    def get_engine_validity(self, header: bytes) -> tuple[Any, int]: ...


class WeightValues(Protocol):
    @property
    def dtype(self) -> Any: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class WeightRefitter(Protocol):
    def refit_cuda_engine(self) -> bool: ...
    def get_all_weights(self) -> list[str]: ...
    def get_missing_weights(self) -> list[str]: ...
    def get_weights_prototype(self, name: str) -> WeightValues: ...
    def set_named_weights(self, name: str, weights: WeightValues) -> bool: ...


class OnnxRefitter(Protocol):
    def refit_from_file(self, path: str) -> bool: ...


class Library(Protocol):
    """The module itself. What is ``Any`` is inherited from or put in a layer's place; so is the logger."""

    __version__: str
    NetworkDefinitionCreationFlag: enums.CreationFlags
    BuilderFlag: enums.BuilderFlags
    MemoryPoolType: enums.MemoryPools
    HardwareCompatibilityLevel: enums.HardwareLevels
    TilingOptimizationLevel: enums.TilingLevels
    ComputeCapability: enums.ComputeCapabilities
    ProfilingVerbosity: enums.Verbosities
    LayerInformationFormat: enums.LayerFormats
    LayerType: enums.LayerTypes
    ReduceOperation: enums.Reductions
    ElementWiseOperation: enums.ElementWises
    DataType: enums.DataTypes
    TensorIOMode: enums.TensorModes
    ExecutionContextAllocationStrategy: enums.AllocationStrategies
    DynamicShapesKernelSpecializationStrategy: enums.SpecialisationStrategies
    CudaGraphStrategy: enums.GraphStrategies
    EngineInvalidityDiagnostics: enums.Invalidities
    ILogger: enums.Severities
    IProgressMonitor: Any
    IStreamWriter: Any
    IAttentionOutputLayer: Any
    ISoftMaxLayer: Any

    def Builder(self, logger: Any) -> NetworkBuilder: ...  # noqa: N802 - TensorRT's names
    def OnnxParser(self, network: Network, logger: Any) -> Parser: ...  # noqa: N802
    def Runtime(self, logger: Any) -> PlanRuntime: ...  # noqa: N802
    def Refitter(self, engine: CudaEngine, logger: Any) -> WeightRefitter: ...  # noqa: N802
    def Weights(self, kind: Any, address: int, count: int) -> WeightValues: ...  # noqa: N802
    def OnnxParserRefitter(self, refitter: WeightRefitter, logger: Any) -> OnnxRefitter: ...  # noqa: N802


# What at least one supported version lacks; of a class that is lacking, its members go without saying
PROBED: Final = frozenset(
    {
        "ComputeCapability",
        "CudaGraphStrategy",
        "DynamicShapesKernelSpecializationStrategy",
        "EngineInvalidityDiagnostics",
        "IAttention",
        "IAttentionOutputLayer",
        "IRuntimeCache",
        "IRuntimeConfig",
        "IStreamWriter",
        "TilingOptimizationLevel",
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "Builder.build_serialized_network_to_stream",
        "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "IBuilderConfig.tiling_optimization_level",
        "ICudaEngine.create_runtime_config",
        "IExecutionContext.is_stream_capturable",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache",
        "LayerType.ATTENTION_OUTPUT",
        "Runtime.get_engine_validity",
    }
)


def has(library: Library, name: str) -> bool:
    """Whether this version has ``Class`` or ``Class.member``, one of ``PROBED``."""
    assert name in PROBED, f"{name} is in every supported version, or the table is not up to date"
    owner, _, member = name.partition(".")
    found = getattr(library, owner, None)
    return found is not None and (not member or hasattr(found, member))
