"""The bundle manifest: typed, versioned JSON. Facts are read from here and never from file names."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from tstitch_engines.spec import ShapeProfile, TensorSpec

__all__ = [
    "SCHEMA",
    "Component",
    "Conditioning",
    "Decoder",
    "Defaults",
    "EngineIdentity",
    "EngineRecord",
    "ExportCheck",
    "Latent",
    "Manifest",
    "Member",
    "NoiseScheduleSpec",
    "Quality",
    "Source",
]

SCHEMA = 1

Parametrisation = Literal["eps", "v", "x0"]
Precision = Literal["fp32", "fp16", "bf16"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the manifest's records: immutable, and an unknown field is an error."""


class Component(_Record, frozen=True, kw_only=True):
    """A file of the bundle: ``path`` is relative to the bundle and may not leave it."""

    path: str
    sha256: str
    bytes: int


class Source(_Record, frozen=True, kw_only=True):
    """What a member was made from; ``name`` is the last part of the path given at build time.

    ``shipped`` sources come with the package, so a rebuild needs no ``--member``.
    """

    name: str
    sha256: str
    bytes: int
    shipped: bool = False


class Latent(_Record, frozen=True, kw_only=True):
    """The latent that all members share: ``[channels, height, width]``; decoded from ``latent / scaling + shift``."""

    channels: int
    height: int
    width: int
    scaling: float = 1.0
    shift: float = 0.0


class NoiseScheduleSpec(_Record, frozen=True, kw_only=True):
    """``alphas_cumprod`` of the forward process, by formula."""

    kind: Literal["linear", "scaled-linear", "squared-cosine"]
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02


class Conditioning(_Record, frozen=True, kw_only=True):
    """Class conditioning: labels ``0..classes-1``; ``null`` is the label of the unconditional half, if there is one."""

    kind: Literal["class"] = "class"
    classes: int
    null: int | None
    names: tuple[str, ...] = ()


class Defaults(_Record, frozen=True, kw_only=True):
    """What ``sample`` uses where the caller says nothing. ``guided_channels`` ``None`` means all."""

    solver: str = "ddim"
    steps: int = 50
    spacing: str = "dit"
    guidance: float = 1.0
    guided_channels: int | None = None
    schedule: str = "small:0.4,large"


class Decoder(_Record, frozen=True, kw_only=True):
    """``pixel``: the latent is the picture, in [-1, 1]. ``none``: the bundle gives latents only."""

    kind: Literal["pixel", "none"]


class EngineIdentity(_Record, frozen=True, kw_only=True):
    """Everything that decides whether an engine file may run here. ``digest`` hashes the record."""

    schema: int
    backend: str
    backend_version: str
    onnx_sha256: str
    precision: Precision
    profile: ShapeProfile
    arch: str
    options: dict[str, str | int | float | bool] = {}


class EngineRecord(_Record, frozen=True, kw_only=True):
    """An engine: ``files[0]`` is what the backend loads, the others lie beside it (weights over 2 GB)."""

    files: tuple[Component, ...]
    identity: EngineIdentity


class ExportCheck(_Record, frozen=True, kw_only=True):
    """The exported graph against PyTorch on random input: worst differences over ``batches``."""

    max_abs: float
    rel_l2: float
    batches: tuple[int, ...]
    against: str


class Member(_Record, frozen=True, kw_only=True):
    """One denoiser. ``onnx[0]`` is the graph, the others its external data. ``config`` is the model's own shape."""

    family: str
    parametrisation: Parametrisation
    precision: Precision
    learned_variance: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    onnx: tuple[Component, ...]
    sources: tuple[Source, ...]
    check: ExportCheck | None
    config: dict[str, int | float | bool | str]
    engines: tuple[EngineRecord, ...] = ()


class Quality(_Record, frozen=True, kw_only=True):
    """A feature network (ONNX: images -> features, logits) and the statistics of held-out real images."""

    network: Component
    reference: Component


class Manifest(_Record, frozen=True, kw_only=True):
    schema: Annotated[int, msgspec.Meta(ge=1)]
    name: str
    recipe: str
    versions: dict[str, str]
    latent: Latent
    noise: NoiseScheduleSpec
    conditioning: Conditioning
    defaults: Defaults
    decoder: Decoder
    members: dict[str, Member]
    quality: Quality | None = None

    def components(self) -> list[Component]:
        """Every file the bundle must hold, each once."""
        found: dict[str, Component] = {}
        for member in self.members.values():
            for part in (*member.onnx, *(part for record in member.engines for part in record.files)):
                found[part.path] = part
        if self.quality is not None:
            for part in (self.quality.network, self.quality.reference):
                found[part.path] = part
        return list(found.values())
