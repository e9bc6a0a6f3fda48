"""What a model family is: it reads checkpoints of one architecture and wraps them to the member signature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tstitch_engines.bundle.manifest import NoiseScheduleSpec, Precision, PredictionType, TextInputs
from tstitch_engines.errors import BadCheckpoint, first_line
from tstitch_engines.spec import TensorSpec
from tstitch_export.checkpoint.conventions import NOTHING_KNOWN, Conventions

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TORCH_NAMES", "Dim", "Family", "Inspection", "InversionUse", "LoraTarget", "LoraUse", "Role", "Scalar"]

Scalar = int | float | bool | str
Role = Literal["member", "text_encoder", "vae_decoder", "vae_encoder", "controlnet"]

TORCH_NAMES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Dim:
    """A dynamic dimension besides the batch: sizes ``multiple, 2 multiple ... most``; ``native`` is the usual one."""

    native: int
    multiple: int = 1
    most: int = 8192


@dataclass(frozen=True)
class LoraUse:
    """A LoRA file that is fused into a network, with its weight."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class InversionUse:
    """A textual inversion: ``vectors`` rows of the tensor ``name``, for ``token``, ``token_1``, ``token_2``..."""

    path: Path
    name: str
    token: str
    vectors: int

    @property
    def tokens(self) -> tuple[str, ...]:
        return (self.token, *(f"{self.token}_{number}" for number in range(1, self.vectors)))


@dataclass(frozen=True, kw_only=True)
class LoraTarget:
    """What LoRAs may name of a network: the ``part`` of the pipeline it is, the ``shapes`` of its state dict.

    ``aliases`` are other spellings of the module names; ``prefix`` is where those modules are in the loaded model.
    """

    part: str = "unet"
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint says about itself before any weight is read.

    ``layout``: how the family stores the model. ``files``: all that the network is made from, LoRAs and textual
    inversions too, the weights last. ``packages``: those whose version decides what is exported, besides the exporter's
    own. ``notes`` say in words what was taken of several things in a file.

    Of a denoiser: ``latent`` is ``(channels, height, width)``, native sizes where they are dynamic; ``labels`` counts
    the rows of the label table, the last of which is the null class where there is one (``null_class``); ``trained``:
    prediction type and noise; ``scaling`` and ``shift`` (of the latent) and ``scheduler`` (``scheduler_config.json``)
    are ``None`` where the checkpoint does not state them. The others are as in ``manifest.Member``; ``text`` names the
    encoders of the architecture, present or not.
    """

    family: str
    layout: str
    path: Path
    files: tuple[Path, ...]
    config: Mapping[str, Scalar]
    latent: tuple[int, int, int] = (0, 0, 0)
    labels: int = 0
    null_class: bool = True
    learned_variance: bool = False
    trained: Conventions = NOTHING_KNOWN
    scaling: float | None = None
    shift: float | None = None
    scheduler: Mapping[str, Any] | None = None
    text: TextInputs | None = None
    guidance_embedding: int = 0
    controlled: bool = False
    inpaints: bool = False
    packages: tuple[str, ...] = ()
    loras: tuple[LoraUse, ...] = ()
    inversions: tuple[InversionUse, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def noise(self) -> NoiseScheduleSpec | None:
        return self.trained.noise

    @property
    def parametrisation(self) -> PredictionType | None:
        return self.trained.prediction

    @property
    def libraries(self) -> tuple[str, ...]:
        """The packages whose version decides what is exported."""
        own = (*self.packages, *(("diffusers",) if self.layout == "diffusers" else ()))
        return ("torch", "onnx", "onnxscript", *dict.fromkeys(own))


class Family(ABC):
    """One architecture. ``inspect`` needs no torch for safetensors; ``load`` and ``example`` do."""

    name: str
    role: ClassVar[Role] = "member"
    options: ClassVar[Mapping[str, tuple[type, str]]]  # what a recipe or `--option MEMBER.NAME=VALUE` may set
    # Those that say how to export and not what the checkpoint is: a recipe's hold for any checkpoint that is given.
    choices: ClassVar[frozenset[str]] = frozenset()

    def inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        """Raises ``BadCheckpoint`` saying what the file looks like when it is no checkpoint of this family."""
        try:
            return self._inspect(path, options)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            # a list where a number belongs, shapes of other lengths: nobody can list what a file may say
            raise BadCheckpoint(
                f"{path} is no whole checkpoint of the family {self.name!r}: {type(error).__name__}: "
                f"{first_line(error)[:200]}",
                hint="copy config.json and the weights again from one model",
            ) from error

    @abstractmethod
    def _inspect(self, path: Path, options: Mapping[str, Scalar]) -> Inspection:
        """Does the work of ``inspect``, for files as they are published."""

    def holds(self, shapes: Mapping[str, tuple[int, ...]], part: str) -> bool:
        """Whether the single file of a whole pipeline with these tensors has this network, as its ``part``."""
        return False

    @abstractmethod
    def load(self, inspection: Inspection) -> nn.Module:
        """The model in float32 and eval mode, with the member signature. Raises ``BadCheckpoint``."""

    @abstractmethod
    def inputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]: ...

    @abstractmethod
    def outputs(self, inspection: Inspection, precision: Precision) -> tuple[TensorSpec, ...]: ...

    def example(
        self, inspection: Inspection, *, batch: int, seed: int, sizes: Mapping[str, int] | None = None
    ) -> tuple[Tensor, ...]:
        """Random float32 and int64 inputs in the order of ``inputs``, as sampling could give them.

        ``sizes`` has one for each of ``dims``; the native ones where it is ``None``.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        native = {name: dim.native for name, dim in self.dims(inspection).items()}
        resolved = {**native, **(sizes or {}), "B": batch}

        def tensor(spec: TensorSpec) -> Tensor:
            shape = spec.resolve(resolved)
            match spec.name:
                case "timestep":
                    return torch.rand(shape, generator=generator) * 999
                case "labels":
                    return torch.randint(0, inspection.labels, shape, generator=generator)
                case "time_ids":  # heights, widths and a score
                    return torch.randint(0, 1024, shape, generator=generator).float()
                case "control" | "control_scale":
                    return torch.rand(shape, generator=generator)
                case "image":
                    return torch.rand(shape, generator=generator) * 2 - 1
            normal = torch.randn(shape, generator=generator)
            if spec.name == "inpaint":
                normal[:, :1] = (normal[:, :1] > 0).float()
            return normal

        return tuple(tensor(spec) for spec in self.inputs(inspection, "fp32"))

    def dims(self, inspection: Inspection) -> Mapping[str, Dim]:
        """The dynamic dimensions besides ``B`` by name: ``H`` and ``W`` of the latent, ``T`` tokens."""
        return {}

    def lora_target(self, inspection: Inspection) -> LoraTarget | None:
        """What LoRAs may change; ``None`` where this family knows no LoRAs."""
        return None

    def assets(self, inspection: Inspection, folder: Path) -> Mapping[str, Path]:
        """Writes the files that are needed at run time besides the model, by purpose (``tokenizer``)."""
        return {}
