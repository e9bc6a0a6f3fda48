"""What passes between the process that asks for an engine and the one that compiles it: JSON, one object per line."""

from __future__ import annotations

import msgspec

from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.spec import ShapeProfile, TensorSpec

__all__ = ["Done", "Failure", "Line", "Phase", "Request", "Said"]


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


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """``share`` of the whole work, in 0..1 and never falling."""

    name: str
    share: float


class Said(msgspec.Struct, frozen=True, tag="said"):
    """A message of the library; ``level`` is one of ``logging``'s."""

    level: int
    text: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    bytes: int
    peak_bytes: int  # the worker's largest resident memory


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """An error of our tree, by the name of its class."""

    kind: str
    message: str
    hint: str


Line = Phase | Said | Done | Failure
