"""What passes between the process that asks for an engine and the one that compiles it."""

from __future__ import annotations

import msgspec

from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.spec import ShapeProfile, TensorSpec

__all__ = ["Done", "Request"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """``gpu``: the CUDA device to compile on, ``None`` where none is needed. ``family`` names the model's kind."""

    flavour: str
    model: str
    output: str
    family: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: ShapeProfile
    options: BuildOptions
    gpu: int | None


class Done(msgspec.Struct, frozen=True):
    """``attention``: how it was settled, in words; empty where there is none in half precision. ``layers``: whether
    their list was written beside the plan.
    """

    bytes: int
    attention: str
    layers: bool = False
