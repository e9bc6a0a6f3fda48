"""TensorRT's own names of what the protocols of the backend describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tstitch_engines.backends.tensorrt import api, enums

__all__ = ["CLASSES", "ENUMS"]

# TensorRT's class -> the protocol that lists what is used of it
CLASSES: Final[Mapping[str, type]] = {
    "Builder": api.NetworkBuilder,
    "INetworkDefinition": api.Network,
    "IBuilderConfig": api.Config,
    "IOptimizationProfile": api.Profile,
    "ITimingCache": api.TimingCache,
    "ITensor": api.Tensor,
    "ILayer": api.Layer,
    "ISoftMaxLayer": api.Softmax,
    "IAttention": api.Attention,
    "IAttentionOutputLayer": api.AttentionOutput,
    "OnnxParser": api.Parser,
    "ParserError": api.ParserError,
    "Runtime": api.PlanRuntime,
    "ICudaEngine": api.CudaEngine,
    "EngineInspector": api.Inspector,
    "IExecutionContext": api.Context,
    "IRuntimeConfig": api.RuntimeConfig,
    "IRuntimeCache": api.RuntimeCache,
    "Refitter": api.WeightRefitter,
    "Weights": api.WeightValues,
    "OnnxParserRefitter": api.OnnxRefitter,
}

# TensorRT's enumeration -> the protocol that lists what is used of it
ENUMS: Final[Mapping[str, type]] = {
    "NetworkDefinitionCreationFlag": enums.CreationFlags,
    "BuilderFlag": enums.BuilderFlags,
    "ILogger": enums.Severities,
    "MemoryPoolType": enums.MemoryPools,
    "HardwareCompatibilityLevel": enums.HardwareLevels,
    "TilingOptimizationLevel": enums.TilingLevels,
    "ComputeCapability": enums.ComputeCapabilities,
    "ProfilingVerbosity": enums.Verbosities,
    "LayerInformationFormat": enums.LayerFormats,
    "LayerType": enums.LayerTypes,
    "ReduceOperation": enums.Reductions,
    "ElementWiseOperation": enums.ElementWises,
    "DataType": enums.DataTypes,
    "TensorIOMode": enums.TensorModes,
    "ExecutionContextAllocationStrategy": enums.AllocationStrategies,
    "DynamicShapesKernelSpecializationStrategy": enums.SpecialisationStrategies,
    "CudaGraphStrategy": enums.GraphStrategies,
    "EngineInvalidityDiagnostics": enums.Invalidities,
}
