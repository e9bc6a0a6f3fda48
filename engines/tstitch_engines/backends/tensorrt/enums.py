"""TensorRT's enumerations and the members of them that are used, as types: mypy lets no other name through.

Values are ``Any``: their integers differ between versions, and so does what may be done with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = [
    "AllocationStrategies",
    "BuilderFlags",
    "ComputeCapabilities",
    "CreationFlags",
    "DataTypes",
    "ElementWises",
    "GraphStrategies",
    "HardwareLevels",
    "Invalidities",
    "LayerFormats",
    "LayerTypes",
    "MemoryPools",
    "Reductions",
    "Severities",
    "SpecialisationStrategies",
    "TensorModes",
    "TilingLevels",
    "Verbosities",
]


class CreationFlags(Protocol):
    STRONGLY_TYPED: Any


class BuilderFlags(Protocol):
    TF32: Any
    REFIT: Any
    REFIT_IDENTICAL: Any
    STRIP_PLAN: Any
    VERSION_COMPATIBLE: Any
    WEIGHT_STREAMING: Any
    REQUIRE_USER_ALLOCATION: Any


class Verbosities(Protocol):
    NONE: Any
    LAYER_NAMES_ONLY: Any
    DETAILED: Any


class LayerFormats(Protocol):
    JSON: Any


class Severities(Protocol):
    """They are also attributes of the logger's class."""

    INTERNAL_ERROR: Any
    ERROR: Any
    WARNING: Any


class MemoryPools(Protocol):
    WORKSPACE: Any


class HardwareLevels(Protocol):
    AMPERE_PLUS: Any
    SAME_COMPUTE_CAPABILITY: Any


class TilingLevels(Protocol):
    NONE: Any
    FAST: Any
    MODERATE: Any
    FULL: Any


class ComputeCapabilities(Protocol):
    """Every version has its own; they are asked for by number."""

    __members__: Mapping[str, Any]


class LayerTypes(Protocol):
    ATTENTION_OUTPUT: Any
    SOFTMAX: Any


class Reductions(Protocol):
    MAX: Any


class ElementWises(Protocol):
    SUB: Any


class DataTypes(Protocol):
    FLOAT: Any
    HALF: Any
    BF16: Any
    INT64: Any
    INT32: Any
    UINT8: Any
    BOOL: Any


class TensorModes(Protocol):
    INPUT: Any


class AllocationStrategies(Protocol):
    USER_MANAGED: Any


class SpecialisationStrategies(Protocol):
    EAGER: Any


class GraphStrategies(Protocol):
    DISABLED: Any


class Invalidities(Protocol):
    """Why an engine can't be loaded."""

    VERSION_MISMATCH: Any
    UNSUPPORTED_CC: Any
    OLD_CUDA_DRIVER: Any
    OLD_CUDA_RUNTIME: Any
    INSUFFICIENT_GPU_MEMORY: Any
    MALFORMED_ENGINE: Any
    CUDA_ERROR: Any
