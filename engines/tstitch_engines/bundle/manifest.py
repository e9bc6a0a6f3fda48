"""The bundle manifest: typed, versioned JSON. Facts are read from here and never from file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from tstitch_engines.errors import BadInput
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
    "Origin",
    "Quality",
    "Quantisation",
    "QuantisationLoss",
    "Source",
    "TextInputs",
    "siblings",
]

SCHEMA = 1

# What the numbers and texts of a manifest may be: far above what any model has, far below what hurts to allocate or
# to print. Checked wherever a manifest or recipe is decoded, a new bundle before it replaces the old one.
# What moves a terminal's cursor or turns its text
_BLANK = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_PRINTED = "text without signs that control a terminal"
Name = Annotated[str, msgspec.Meta(max_length=500, pattern=rf"\A[^{_BLANK}]*\Z", description=_PRINTED)]
Text = Annotated[str, msgspec.Meta(max_length=20_000, pattern=rf"\A(?:[^{_BLANK}]|[\t\n\r])*\Z", description=_PRINTED)]
NetworkName = Annotated[
    str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9_-]{0,63}\Z", description="a small letter, then a-z, 0-9, _ and -")
]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z", description="64 hex digits")]
Commit = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{40}\Z", description="40 hex digits")]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
Channels = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Side = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Width = Annotated[int, msgspec.Meta(ge=0, le=65_536)]
Steps = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Classes = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Seed = Annotated[int, msgspec.Meta(ge=0)]
Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Scale = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
Shift = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Beta = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Few = msgspec.Meta(max_length=1000)
Some = msgspec.Meta(min_length=1, max_length=1000)
Many = msgspec.Meta(max_length=100_000)

PredictionType = Literal["eps", "v", "x0"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Option = Text | Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | Number | bool
Options = Annotated[dict[Name, Option], Few]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the manifest's records: immutable, and an unknown field is an error."""


class Component(_Record, frozen=True, kw_only=True):
    """A file of the bundle: ``path`` is relative to the bundle and may not leave it."""

    path: Name
    sha256: Sha256
    bytes: Bytes


def siblings(files: Sequence[Component]) -> frozenset[str]:
    """The names, without folders, of the files that lie beside ``files[0]``: what it may read."""
    folder = files[0].path.rpartition("/")[0] if files else ""
    found = (part.path.rpartition("/") for part in files[1:])
    return frozenset(name for place, _, name in found if place == folder)


class Origin(_Record, frozen=True, kw_only=True):
    """Where on Hugging Face a file is from: ``path`` in the ``repository`` (``ORG/NAME``) at ``commit``.

    ``revision``: the branch, tag or commit that was asked for. ``given``: the file or folder of the repository that was
    named at build time, empty for all of it.
    """

    repository: Name
    revision: Name
    commit: Commit
    path: Name
    given: Name = ""

    def __str__(self) -> str:
        """What names the same files for ever: ``ORG/NAME/GIVEN@COMMIT``."""
        return f"{self.repository}{self.given and '/'}{self.given}@{self.commit}"


class Source(_Record, frozen=True, kw_only=True):
    """What a member was made from; ``name`` is the last part of the path given at build time.

    ``shipped`` sources come with the package, so a rebuild needs no ``--member``. ``origin``: of a file of a Hugging
    Face repository; absent for others.
    """

    name: Name
    sha256: Sha256
    bytes: Bytes
    shipped: bool = False
    origin: Origin | msgspec.UnsetType = msgspec.UNSET


class Latent(_Record, frozen=True, kw_only=True):
    """The latent that all members share: ``[channels, height, width]``; decoded from ``latent / scaling + shift``."""

    channels: Channels
    height: Side
    width: Side
    scaling: Scale = 1.0
    shift: Shift = 0.0


class NoiseScheduleSpec(_Record, frozen=True, kw_only=True):
    """``alphas_cumprod`` of the forward process, by formula, or by its ``betas`` where the kind is ``betas``.

    ``zero_terminal_snr``: the betas are rescaled so that the last timestep has no signal at all (arXiv 2305.08891,
    algorithm 1).
    """

    kind: Literal["linear", "scaled-linear", "squared-cosine", "betas"]
    steps: Steps = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    zero_terminal_snr: bool = False
    betas: Annotated[tuple[Beta, ...], Many] = ()

    def __post_init__(self) -> None:
        if not (1 <= self.steps <= 100_000 and 0 < self.beta_start <= self.beta_end < 1):
            raise BadInput(
                f"noise has {self.steps} steps and beta {self.beta_start} to {self.beta_end}; allowed are 1 to 100000 "
                "steps and 0 < beta_start <= beta_end < 1",
                hint="1000 steps and 0.0001 to 0.02 are usual",
            )
        if self.zero_terminal_snr and self.steps < 2:
            raise BadInput(
                "noise of 1 step with zero terminal SNR has no signal anywhere; allowed are 2 steps or more",
                hint="set noise.steps to the number of timesteps the model was trained with, e.g. 1000",
            )
        if len(self.betas) != (self.steps if self.kind == "betas" else 0):
            raise BadInput(
                f"noise is {self.kind} over {self.steps} steps and has {len(self.betas)} betas; allowed is one for "
                "each step where the kind is betas, and none for other kinds",
                hint="set noise.kind to betas and noise.steps to the number of betas, or leave noise.betas out",
            )

    def __str__(self) -> str:
        first, last = (self.betas[0], self.betas[-1]) if self.betas else (self.beta_start, self.beta_end)
        betas = "" if self.kind == "squared-cosine" else f", beta {first:g} to {last:g}"
        return f"{self.kind}, {self.steps} steps{betas}{', zero terminal SNR' if self.zero_terminal_snr else ''}"


class Conditioning(_Record, frozen=True, kw_only=True):
    """What the request says about the picture.

    ``class``: labels ``0..classes-1``; ``null`` is the label of the unconditional half, if any. ``text``: prompts, or
    embeddings without a text encoder; the unconditional half is the negative prompt.
    """

    kind: Literal["class", "text"] = "class"
    classes: Classes = 0
    null: Classes | None = None
    names: Annotated[tuple[Name, ...], msgspec.Meta(max_length=1_000_000)] = ()

    @property
    def guidable(self) -> bool:
        """Whether there is an unconditional half, which guidance needs."""
        return self.kind == "text" or self.null is not None


class Defaults(_Record, frozen=True, kw_only=True):
    """What ``sample`` uses where the caller says nothing. ``guided_channels`` ``None`` means all.

    ``solver_options`` (of ``tstitch_trt.solvers``) are for ``solver`` only; ``steps_offset`` among them goes with the
    spacing ``leading`` whatever the solver.
    """

    solver: Name = "ddim"
    solver_options: Options = {}
    steps: Steps = 50
    spacing: Name = "dit"
    guidance: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 1.0
    guided_channels: Channels | None = None
    schedule: Text = "small:0.4,large"


def guided_by_default(conditioning: Conditioning, defaults: Defaults) -> bool:
    """Whether guidance is on where a request says nothing of it."""
    return conditioning.guidable and defaults.guidance != 1


class Decoder(_Record, frozen=True, kw_only=True):
    """``pixel``: the latent is the picture, in [-1, 1]. ``vae``: the part ``vae_decoder`` makes it, in [-1, 1].

    ``none``: the bundle gives latents only. ``factor``: pixels per latent element, along each side.
    """

    kind: Literal["pixel", "vae", "none"]
    factor: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1


class EngineIdentity(_Record, frozen=True, kw_only=True):
    """Everything that decides whether an engine file may run here. ``digest`` hashes the record.

    ``gpu``: the model that the engine is for; absent where it runs on others of its ``arch`` too, or was made before
    this was recorded.
    """

    schema: Count
    backend: Name
    backend_version: Name
    onnx_sha256: Sha256
    precision: Precision
    profile: ShapeProfile
    arch: Name
    gpu: Name | msgspec.UnsetType = msgspec.UNSET
    options: Options = {}

    @property
    def target(self) -> str:
        """What it runs on, e.g. ``sm_90 (NVIDIA H200)``."""
        return self.arch if self.gpu is msgspec.UNSET else f"{self.arch} ({self.gpu})"


class EngineRecord(_Record, frozen=True, kw_only=True):
    """An engine: ``files[0]`` is what the backend loads, the others lie beside it (weights over 2 GB).

    ``driver``: the GPU driver that it was compiled with, where it may matter (``Backend.driver``).
    ``notes``: what its compiler made of it, by topic (``attention``: ``12 fused``).
    """

    files: Annotated[tuple[Component, ...], Some]
    identity: EngineIdentity
    driver: Name | msgspec.UnsetType = msgspec.UNSET
    notes: Annotated[dict[Name, Name], Few] = {}


class ExportCheck(_Record, frozen=True, kw_only=True):
    """The exported graph against PyTorch on random input: worst differences over ``batches``."""

    max_abs: Number
    rel_l2: Number
    batches: Annotated[tuple[Count, ...], Some]
    against: Name


class Network(_Record, frozen=True, kw_only=True):
    """One model of the bundle. ``onnx[0]`` is the graph, the others its external data; ``config`` its own shape.

    ``files``: what else it needs at run time, by purpose: ``tokenizer``, ``weights`` (``bundle.weights``).
    ``multiples``: of what its dynamic dimensions must be multiples, where not 1 (``H``, ``W`` of a UNet).
    """

    family: Name
    precision: Precision
    inputs: Annotated[tuple[TensorSpec, ...], Few]
    outputs: Annotated[tuple[TensorSpec, ...], Some]
    onnx: Annotated[tuple[Component, ...], Few]
    sources: Annotated[tuple[Source, ...], Few]
    check: ExportCheck | None
    config: Options
    engines: Annotated[tuple[EngineRecord, ...], Few] = ()
    files: Annotated[dict[Name, Component], Few] = {}
    multiples: Annotated[dict[Name, Channels], Few] = {}

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

    hidden: Annotated[tuple[NetworkName, ...], Few]
    width: Side
    pooled: NetworkName | None = None
    pooled_width: Width = 0
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

    timesteps: tuple[Number, Number]
    rows: Count
    rel_l2: Number
    cosine: Number
    max_abs: Number


class Quantisation(_Record, frozen=True, kw_only=True):
    """How a member was quantised, and what it cost.

    ``layers`` are in 8 bits, ``kept`` were kept out on request, all others compute in ``high_precision``. ``rows``
    recorded inputs of trajectories over ``schedules`` set the ranges; they span ``timesteps`` (noisiest, cleanest).
    ``loss`` is by noise level, noisiest first. ``latents``: relative L2 between the final latents of whole trajectories
    over ``latents_schedule``, with and without quantisation, one for each of ``latents_seeds``. ``prompts``: of text
    bundles; trajectory ``seed`` had prompt ``seed % len``.
    """

    method: Name
    high_precision: Precision
    source_precision: Precision
    source_sha256: Sha256
    layers: Annotated[tuple[Name, ...], Many]
    kept: Annotated[tuple[Name, ...], Many]
    rows: Count
    seed: Seed
    steps: Steps
    solver: Name
    guidance: Number
    schedules: Annotated[tuple[Text, ...], Few]
    timesteps: tuple[Number, Number]
    loss: Annotated[tuple[QuantisationLoss, ...], Some]
    latents: Annotated[tuple[Number, ...], Some]
    latents_seeds: Annotated[tuple[Seed, ...], Some]
    latents_schedule: Text
    prompts: Annotated[tuple[Text, ...], Many] = ()


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
    latent_ratio: Scale = 1.0
    text: TextInputs | None = None
    guidance_embedding: Width = 0
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
    """The whole of ``manifest.json``.

    ``schema``: the version of the format. ``versions``: of the packages that made the bundle. ``parts``: the models
    beside the members, by ``ComponentName``; a member's own text encoder is ``MEMBER_text_encoder``. ``notes``: what
    was adapted between members, and what is missing.
    """

    schema: Annotated[int, msgspec.Meta(ge=1)]
    name: Name
    recipe: Name
    versions: Annotated[dict[Name, Name], Few]
    latent: Latent
    noise: NoiseScheduleSpec
    conditioning: Conditioning
    defaults: Defaults
    decoder: Decoder
    members: Annotated[dict[NetworkName, Member], msgspec.Meta(min_length=1, max_length=64)]
    parts: Annotated[dict[NetworkName, Network], Few] = {}
    quality: Quality | None = None
    notes: Annotated[tuple[Text, ...], Few] = ()

    def networks(self) -> dict[str, Network]:
        """Members and parts by name."""
        return {**self.members, **self.parts}

    def word(self, name: str) -> str:
        """What messages call the network ``name``: ``member`` or ``part``."""
        return "member" if name in self.members else "part"

    def usually_guided(self, name: str) -> bool:
        """Whether a step of the network ``name`` runs both halves of guidance unless a request says otherwise.

        A distilled member takes the scale as an input and runs one. A part runs both where some member does.
        """
        members = [self.members[name]] if name in self.members else self.members.values()
        plain = any(not member.guidance_embedding for member in members)
        return plain and guided_by_default(self.conditioning, self.defaults)

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
