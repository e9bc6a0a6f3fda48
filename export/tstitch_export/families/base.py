"""What a model family is: it reads checkpoints of one architecture and wraps them to the member signature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tstitch_engines.manifest import NoiseScheduleSpec, Parametrisation, Precision
from tstitch_engines.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TORCH_NAMES", "Family", "Inspection", "Scalar"]

Scalar = int | float | bool | str

TORCH_NAMES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint says about itself before any weight is read.

    ``layout`` is one of the family's ways to store the model; ``labels`` counts the rows of the label table, the null
    class included; ``noise`` and ``parametrisation`` are ``None`` where the checkpoint does not state them; ``files``
    are what the member is made from, the weights last.
    """

    family: str
    layout: str
    path: Path
    files: tuple[Path, ...]
    config: Mapping[str, Scalar]
    latent: tuple[int, int, int]
    labels: int
    learned_variance: bool
    noise: NoiseScheduleSpec | None = None
    parametrisation: Parametrisation | None = None

    @property
    def libraries(self) -> tuple[str, ...]:
        """The packages whose version decides what is exported."""
        return ("torch", "onnx", "onnxscript", *(("diffusers",) if self.layout == "diffusers" else ()))


class Family(ABC):
    """One architecture. ``inspect`` needs no torch for safetensors; ``load`` and ``example`` do."""

    name: str
    options: Mapping[str, tuple[type, str]]  # what a recipe or `--option MEMBER.NAME=VALUE` may set

    @abstractmethod
    def inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        """Raises ``BadCheckpoint`` saying what the file looks like when it is no checkpoint of this family."""

    @abstractmethod
    def load(self, inspection: Inspection) -> nn.Module:
        """The model in float32 and eval mode, with the member signature. Raises ``BadCheckpoint``."""

    @abstractmethod
    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]: ...

    @abstractmethod
    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]: ...

    @abstractmethod
    def example(self, inspection: Inspection, *, batch: int, seed: int) -> tuple[Tensor, ...]:
        """Random float32 and int64 inputs in the order of ``inputs``, as sampling could give them."""
