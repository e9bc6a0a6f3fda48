"""What differs between TensorRT and TensorRT-RTX. Everything else is found out by looking for an attribute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

__all__ = ["FLAVOURS", "RTX", "TENSORRT", "Flavour"]


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """``modules``: import names, the first that is whole is used. ``refused``: options it can't honour, and why.

    ``sums_in_float32``: the first version whose fused attention in float16 adds in float32 when asked to.
    """

    name: str
    title: str
    versions: str
    modules: tuple[str, ...]
    extra: str
    suffix: str
    compiles_without_gpu: bool
    sums_in_float32: tuple[int, int]
    refused: Mapping[str, str] = field(default_factory=dict)


TENSORRT: Final = Flavour(
    name="tensorrt",
    title="TensorRT",
    versions="10.1 to 11",
    modules=("tensorrt", "tensorrt_bindings"),
    extra="tensorrt",
    suffix=".trt",
    compiles_without_gpu=False,
    sums_in_float32=(11, 3),
    refused={
        "compute-capabilities": "TensorRT compiles for the GPU it compiles on; --option hardware-compatible=ampere+ "
        "makes an engine that other GPUs run too"
    },
)

_SAME_PLAN: Final = "TensorRT-RTX takes it and makes the same plan, byte for byte"
RTX: Final = Flavour(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    versions="1.5 or newer",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    extra="rtx",
    suffix=".rtx",
    compiles_without_gpu=True,
    sums_in_float32=(1, 7),
    refused={
        "optimisation-level": _SAME_PLAN,
        "tiling": _SAME_PLAN,
        "timing-cache": "TensorRT-RTX times no kernels while it compiles",
        "hardware-compatible": "a TensorRT-RTX plan runs on every GPU in its list; choose them with "
        "--option compute-capabilities=8.6,8.9,12.0",
        "version-compatible": "a TensorRT-RTX plan is for exactly one version of the library",
    },
)

FLAVOURS: Final[Mapping[str, Flavour]] = {flavour.name: flavour for flavour in (TENSORRT, RTX)}
