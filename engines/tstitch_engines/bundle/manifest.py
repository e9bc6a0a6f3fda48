"""The bundle manifest: typed, versioned JSON. Facts are read from here and never from file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from tstitch_engines.spec import Range, ShapeProfile, TensorSpec

__all__ = [
    "SCHEMA",
    "Component",
    "ComponentName",
    "Conditioning",
    "Decoder",
    "Defaults",
    "EngineIdentity",
    "EngineRecord",
    "ExportCheck",
    "Latent",
    "Manifest",
    "Member",
    "Network",
    "NoiseScheduleSpec",
    "Quality",
    "Quantisation",
    "QuantisationLoss",
    "Source",
    "TextInputs",
    "siblings",
]

SCHEMA = 1

PredictionType = Literal["eps", "v", "x0"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Option = str | int | float | bool


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the manifest's records: immutable, and an unknown field is an error."""


class Component(_Record, frozen=True, kw_only=True):
    """A file of the bundle: ``path`` is relative to the bundle and may not leave it."""

    path: str
    sha256: str
    bytes: int


def siblings(files: Sequence[Component]) -> frozenset[str]:
    """The names, without folders, of the files that lie beside ``files[0]``: what it may read."""
    folder = files[0].path.rpartition("/")[0] if files else ""
    found = (part.path.rpartition("/") for part in files[1:])
    return frozenset(name for place, _, name in found if place == folder)


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
    """What the request says about the picture.

    ``class``: labels ``0..classes-1``; ``null`` is the label of the unconditional half, if any. ``text``: prompts, or
    embeddings without a text encoder; the unconditional half is the negative prompt.
    """

    kind: Literal["class", "text"] = "class"
    classes: int = 0
    null: int | None = None
    names: tuple[str, ...] = ()

    @property
    def guidable(self) -> bool:
        """Whether there is an unconditional half, which guidance needs."""
        return self.kind == "text" or self.null is not None


class Defaults(_Record, frozen=True, kw_only=True):
    """What ``sample`` uses where the caller says nothing. ``guided_channels`` ``None`` means all.

    ``solver_options`` (of ``tstitch_trt.solvers``) are for ``solver`` only; ``steps_offset`` among them goes with the
    spacing ``leading`` whatever the solver.
    """

    solver: str = "ddim"
    solver_options: dict[str, Option] = {}
    steps: int = 50
    spacing: str = "dit"
    guidance: float = 1.0
    guided_channels: int | None = None
    schedule: str = "small:0.4,large"


class Decoder(_Record, frozen=True, kw_only=True):
    """``pixel``: the latent is the picture, in [-1, 1]. ``vae``: the part ``vae_decoder`` makes it, in [-1, 1].

    ``none``: the bundle gives latents only. ``factor``: pixels per latent element, along each side.
    """

    kind: Literal["pixel", "vae", "none"]
    factor: int = 1


class EngineIdentity(_Record, frozen=True, kw_only=True):
    """Everything that decides whether an engine file may run here. ``digest`` hashes the record."""

    schema: int
    backend: str
    backend_version: str
    onnx_sha256: str
    precision: Precision
    profile: ShapeProfile
    arch: str
    options: dict[str, Option] = {}


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


class Network(_Record, frozen=True, kw_only=True):
    """One model of the bundle. ``onnx[0]`` is the graph, the others its external data; ``config`` its own shape.

    ``files``: what else it needs at run time, by purpose: ``tokenizer``, ``weights`` (``bundle.weights``).
    ``multiples``: of what its dynamic dimensions must be multiples, where not 1 (``H``, ``W`` of a UNet).
    """

    family: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    onnx: tuple[Component, ...]
    sources: tuple[Source, ...]
    check: ExportCheck | None
    config: dict[str, Option]
    engines: tuple[EngineRecord, ...] = ()
    files: dict[str, Component] = {}
    multiples: dict[str, int] = {}

    @property
    def dims(self) -> list[str]:
        """The names of its dynamic dimensions, sorted."""
        return sorted({name for spec in (*self.inputs, *self.outputs) for name in spec.dims})

    def profile_of(self, ranges: Mapping[str, Range]) -> ShapeProfile:
        """Its own among the ``ranges`` of dimensions."""
        return ShapeProfile({name: ranges[name] for name in self.dims})


class TextInputs(_Record, frozen=True, kw_only=True):
    """How text reaches a member: ``encoder_hidden_states [B,T,width]`` and, for SDXL, ``text_embeds`` and ``time_ids``.

    ``hidden``: the text encoders (keys of ``Manifest.parts``) whose hidden states are concatenated; ``pooled``: the one
    whose projection ``[B,pooled_width]`` is ``text_embeds``. ``time_ids``: ``sizes`` is height and width of the
    original, top and left of the crop, height and width of the image (SDXL, arXiv 2307.01952, section 2.2);
    ``aesthetic`` has a score in place of the last two (the refiner). ``zero_null``: without a negative prompt the
    unconditional half is zeros.
    """

    hidden: tuple[str, ...]
    width: int
    pooled: str | None = None
    pooled_width: int = 0
    time_ids: Literal["none", "sizes", "aesthetic"] = "none"
    zero_null: bool = False

    @property
    def encoders(self) -> tuple[str, ...]:
        """All text encoders, each once."""
        return tuple(dict.fromkeys((*self.hidden, *filter(None, [self.pooled]))))


class QuantisationLoss(_Record, frozen=True, kw_only=True):
    """What 8 bits cost: the quantised against the source graph on ``rows`` inputs that were not calibrated on.

    ``timesteps``: the noisiest and the cleanest of this group of noise levels. ``rel_l2``: norm of the difference over
    norm of the source's outputs; ``cosine``: the lowest of any row; ``max_abs``: the largest difference.
    """

    timesteps: tuple[float, float]
    rows: int
    rel_l2: float
    cosine: float
    max_abs: float


class Quantisation(_Record, frozen=True, kw_only=True):
    """How a member was quantised, and what it cost.

    ``layers`` are in 8 bits, ``kept`` were kept out on request, all others compute in ``high_precision``. ``rows``
    recorded inputs of trajectories over ``schedules`` set the ranges; they span ``timesteps`` (noisiest, cleanest).
    ``loss`` is by noise level, noisiest first. ``latents``: relative L2 between the final latents of whole trajectories
    over ``latents_schedule``, with and without quantisation, one for each of ``latents_seeds``. ``prompts``: of text
    bundles; trajectory ``seed`` had prompt ``seed % len``.
    """

    method: str
    high_precision: Precision
    source_precision: Precision
    source_sha256: str
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    rows: int
    seed: int
    steps: int
    solver: str
    guidance: float
    schedules: tuple[str, ...]
    timesteps: tuple[float, float]
    loss: tuple[QuantisationLoss, ...]
    latents: tuple[float, ...]
    latents_seeds: tuple[int, ...]
    latents_schedule: str
    prompts: tuple[str, ...] = ()


class Member(Network, frozen=True, kw_only=True):
    """One denoiser.

    Its differences from the bundle's conventions are adapted in the rows of the plan: ``noise`` is the schedule it was
    trained with (``None``: the bundle's), ``latent_ratio`` its scaling factor over the bundle's.
    ``guidance_embedding``: width of ``timestep_cond``, the embedded guidance scale of distilled members (arXiv
    2310.04378), 0 without. ``controlled``: it takes a ControlNet's residuals. ``inpaints``: it takes ``inpaint
    [B,1+C,H,W]``, mask and masked latent. ``quantisation``: how an int8 or fp8 member was made.
    """

    parametrisation: PredictionType
    learned_variance: bool
    noise: NoiseScheduleSpec | None = None
    latent_ratio: float = 1.0
    text: TextInputs | None = None
    guidance_embedding: int = 0
    controlled: bool = False
    inpaints: bool = False
    quantisation: Quantisation | None = None


class ComponentName(StrEnum):
    """The names of ``Manifest.parts``."""

    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"  # SDXL's second
    VAE_DECODER = "vae_decoder"
    VAE_ENCODER = "vae_encoder"
    CONTROLNET = "controlnet"

    __repr__ = str.__repr__  # messages show it like any other name


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
    parts: dict[str, Network] = {}  # by ComponentName; a member's own text encoder is MEMBER_text_encoder
    quality: Quality | None = None
    notes: tuple[str, ...] = ()  # what was adapted between members, and what is missing

    def networks(self) -> dict[str, Network]:
        """Members and parts by name."""
        return {**self.members, **self.parts}

    def word(self, name: str) -> str:
        """What messages call the network ``name``: ``member`` or ``part``."""
        return "member" if name in self.members else "part"

    def components(self) -> list[Component]:
        """Every file the bundle must hold, each once."""
        found: dict[str, Component] = {}
        for network in self.networks().values():
            engines = (part for record in network.engines for part in record.files)
            for part in (*network.onnx, *network.files.values(), *engines):
                found[part.path] = part
        if self.quality is not None:
            for part in (self.quality.network, self.quality.reference):
                found[part.path] = part
        return list(found.values())

    def engine_paths(self) -> set[str]:
        """The paths of the files that were compiled from the others."""
        return {part.path for network in self.networks().values() for e in network.engines for part in e.files}
