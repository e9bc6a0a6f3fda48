"""A library that stands in for TensorRT's builder: what is asked of it is noted, and its plan is a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum, IntEnum, auto
from types import SimpleNamespace
from typing import Any

from support.tensorrt_builds import shipped_small
from tstitch_engines.spec import TensorSpec

__all__ = ["BuildStand"]


class DataType(Enum):
    FLOAT = auto()
    HALF = auto()
    BF16 = auto()
    INT64 = auto()
    INT32 = auto()
    UINT8 = auto()
    BOOL = auto()


class LayerType(Enum):
    ATTENTION_OUTPUT = auto()
    SOFTMAX = auto()


class Flag(IntEnum):
    TF32 = 0
    STRONGLY_TYPED = 1


class Tensor:
    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class Layer:
    """``tensors``: query, key and value; the result is of their type."""

    def __init__(self, kind: LayerType, tensors: list[Tensor]) -> None:
        self.type = kind
        self.inputs = tensors
        self.attention = self
        self.decomposable = False
        self.num_inputs = len(tensors)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return Tensor("result", self.inputs[0].dtype, self.inputs[0].shape)


class BuildStand:
    """One library. ``half_heads``: sizes of the attention heads of its network, in float16.

    ``kernels``: the head sizes with a fused kernel; ``no_kernel``: the error of others. ``timed``: the kernels that a
    build times and adds to its cache, which is a list in JSON. ``building`` is called in the middle of a build.
    """

    def __init__(
        self,
        *,
        half_heads: tuple[int, ...] = (),
        kernels: tuple[int, ...] = (),
        no_kernel: str = "Attention operation was not supported by a dedicated kernel.",
        timed: str = "",
    ) -> None:
        self.asked: list[list[bool]] = []  # of every build: may its attentions be decomposed
        self.building: Callable[[], None] = lambda: None
        member, _ = shipped_small()
        stand = self

        def tensors(specs: tuple[TensorSpec, ...]) -> list[Tensor]:
            kinds = {"float32": DataType.FLOAT, "int64": DataType.INT64}
            sizes = [tuple(size if isinstance(size, int) else -1 for size in spec.shape) for spec in specs]
            return [Tensor(spec.name, kinds[spec.dtype], size) for spec, size in zip(specs, sizes, strict=True)]

        class Network:
            def __init__(self) -> None:
                self.inputs, self.outputs = tensors(member.inputs), tensors(member.outputs)
                self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
                made = [Tensor("query", DataType.HALF, (-1, 2, 16, head)) for head in half_heads]
                self.layers = [Layer(LayerType.ATTENTION_OUTPUT, [one] * 3) for one in made]
                self.num_layers = len(self.layers)
                self.get_input, self.get_output = self.inputs.__getitem__, self.outputs.__getitem__
                self.get_layer = self.layers.__getitem__

        class TimingCache:
            def __init__(self, known: list[str]) -> None:
                self.known = known

            def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
                self.known = sorted({*self.known, *other.known})
                return True

            def serialize(self) -> bytes:
                return json.dumps(self.known).encode()

        class Config:
            progress_monitor: Any = None
            max_aux_streams = -1
            cache: TimingCache | None = None

            def clear_flag(self, flag: Flag) -> None:
                return

            def add_optimization_profile(self, profile: Any) -> int:
                return 0

            def create_timing_cache(self, blob: bytes) -> TimingCache:
                return TimingCache(json.loads(blob or b"[]"))

            def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
                self.cache = cache
                return True

            def get_timing_cache(self) -> TimingCache | None:
                return self.cache

        class Builder:
            def __init__(self, logger: Any) -> None:
                self._logger = logger

            def create_network(self, flags: int) -> Network:
                assert flags == 1 << Flag.STRONGLY_TYPED
                return Network()

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Any:
                return SimpleNamespace(set_shape=lambda *shapes: None)

            def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
                stand.asked.append([layer.decomposable for layer in network.layers])
                for layer in network.layers:
                    if not layer.decomposable and layer.inputs[0].shape[-1] not in kernels:
                        self._logger.log(ILogger.ERROR, no_kernel)
                        return None
                if config.cache is not None:
                    config.cache.known = sorted({*config.cache.known, timed})
                stand.building()
                return b"plan"

        class OnnxParser:
            def __init__(self, network: Network, logger: Any) -> None:
                return

            def parse_from_file(self, path: str) -> bool:
                return True

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

        self.library: Any = SimpleNamespace(
            __version__="10.16.1.11",
            Builder=Builder,
            OnnxParser=OnnxParser,
            ILogger=ILogger,
            IExecutionContext=SimpleNamespace(set_device_memory=None),
            IProgressMonitor=type("IProgressMonitor", (), {}),
            NetworkDefinitionCreationFlag=Flag,
            BuilderFlag=Flag,
            DataType=DataType,
            LayerType=LayerType,
            IAttention=Layer,
            IAttentionOutputLayer=Layer,
        )
