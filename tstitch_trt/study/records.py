"""The records of studies, kept in the bundle: cost, divergence, quality, and the choice between schedules.

Every record names the weights it was measured on (``weights``: sha256 of each member's ONNX model) and its command, so
that a record of other weights is never used silently. Times are milliseconds; points in time are ISO 8601 in UTC.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Count, Number, Seed, Text
from tstitch_trt.request.batching import Splitting
from tstitch_trt.study.machine import Machine

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "MARGIN",
    "METRICS",
    "PAIRED",
    "STUDY_SCHEMA",
    "Calibration",
    "Check",
    "Divergence",
    "DivergenceStep",
    "Evaluation",
    "Measure",
    "OrderTrial",
    "Overhead",
    "Point",
    "Search",
    "SearchPoint",
    "Setting",
    "StepCost",
    "Study",
    "StudyKind",
]

STUDY_SCHEMA: Final = 2

LOWER_IS_BETTER: Final = ("fid", "kid", "lpips", "latent_error")
HIGHER_IS_BETTER: Final = ("precision", "recall", "accuracy", "psnr", "clip")
MARGIN: Final = 0.05  # why: tstitch_trt.study.noninferiority
METRICS: Final = (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)
PAIRED: Final = ("lpips", "latent_error", "psnr")  # how far pictures are from the reference's, not how good they are


Positive = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Ms = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
Above = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
Margin = Annotated[float, msgspec.Meta(gt=0, le=1)]

StudyKind = Literal["calibration", "divergence", "evaluation", "search"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Study(_Record, frozen=True, kw_only=True):
    """The fields of all studies. ``made``: when. ``command``: repeats the measurement. ``kind``: its name in files."""

    kind: ClassVar[StudyKind]
    schema: Annotated[int, msgspec.Meta(ge=1)] = STUDY_SCHEMA
    bundle: Text
    weights: dict[Text, Text]
    machine: Machine
    command: Text
    made: Text


class Setting(_Record, frozen=True, kw_only=True):
    """One way to draw: the resolved arguments of ``make_plan``.

    ``schedule`` is the canonical text (``small:20,large:30``) of ``rows`` rows of the step table (one more than
    ``steps`` for ``pndm``). ``members``: rows by member. ``plan``: further keywords of ``make_plan``.
    """

    schedule: Text
    members: dict[Text, Count]
    steps: Positive
    rows: Positive
    solver: Text
    guidance: Number
    plan: dict[str, Any] = {}

    def share(self, member: str) -> float:
        """The share of the rows that ``member`` runs."""
        return self.members.get(member, 0) / self.rows


# --- cost: tstitch-trt calibrate


class StepCost(_Record, frozen=True, kw_only=True):
    """One step (prepare, engine, advance) of a member on ``batch`` images, whose latents are ``height`` x ``width``.

    ``guided``: both halves run, ``2 batch`` rows. ``ms`` is fitted to the medians of trajectories; the 10th and 90th
    percentile are those of ``blocks`` trajectories of this member alone, per step.
    """

    member: Text
    guided: bool
    batch: Positive
    height: Positive
    width: Positive
    ms: Ms
    p10_ms: Ms
    p90_ms: Ms
    blocks: Count


class Overhead(_Record, frozen=True, kw_only=True):
    """The cost of a chunk of ``batch`` images beside its steps.

    ``ms`` once, and ``switch_ms`` for each change of the member, or from guided to unguided steps or back.
    """

    batch: Positive
    height: Positive
    width: Positive
    ms: Ms
    switch_ms: Ms = 0.0


class Check(_Record, frozen=True, kw_only=True):
    """One random schedule that the model was not fitted on, predicted and measured.

    ``measured_ms``: without the machine's drift (``tstitch_trt.study.calibrate.drift``), from ``repeats`` runs.
    ``guidance_interval``: only the steps ``start <= i < stop`` were guided.
    """

    schedule: Text
    steps: Positive
    guidance: Number
    guidance_interval: tuple[Count, Count] | None = None
    batch: Positive
    height: Positive
    width: Positive
    predicted_ms: Above
    measured_ms: Above
    repeats: Positive

    @property
    def error(self) -> float:
        """Signed relative error of the prediction."""
        return self.predicted_ms / self.measured_ms - 1


class Calibration(Study, frozen=True, kw_only=True):
    """``time = sum of member steps + overhead`` on one machine, device, backend and number of threads.

    ``threads``: 0 is all cores. ``graph``: the mode in use (``off``, ``step``, ``segment``). ``engines``: the digest of
    the identity of each member's engine. ``splitting``: how a request becomes chunks. ``seed``: of the checks.
    ``median_error`` and ``worst_error``: of the checks, without sign. ``upper_ratio``: the 98th percentile of measured
    over predicted time of single runs, the first of each slot; a budget is compared with ``predicted x upper_ratio``.
    """

    kind = "calibration"
    backend: Text
    device: Text
    threads: Count
    graph: Text
    engines: dict[Text, Text]
    splitting: Splitting
    repeats: Positive
    seed: Seed = 0
    steps: tuple[StepCost, ...]
    overheads: tuple[Overhead, ...]
    checks: tuple[Check, ...]
    median_error: Number
    worst_error: Number
    upper_ratio: Above


# --- divergence: tstitch-trt profile


class DivergenceStep(_Record, frozen=True, kw_only=True):
    """How far a member's denoised estimate is from the reference member's, at a state of the reference's trajectory.

    ``cosine`` and ``rel_l2`` (norm of the difference over norm of the reference's) are medians over the seeds, with the
    10th and 90th percentile of ``rel_l2``. ``sigma``: noise over signal, ``None`` where there is no signal.
    """

    step: Count
    timestep: Number
    sigma: Number | None
    cosine: Number
    rel_l2: Number
    p10: Number
    p90: Number


class OrderTrial(_Record, frozen=True, kw_only=True):
    """A schedule that was run: relative L2 of its final latents from those of the reference alone.

    ``order``: ``small-first``, ``large-first``, ``large-small-large``... ``share`` of the steps on the small member.
    ``latent_error``: median over the seeds.
    """

    order: Text
    share: Number = 0.0
    schedule: Text
    latent_error: Number
    p10: Number
    p90: Number


class Divergence(Study, frozen=True, kw_only=True):
    """``members``: each member's divergence from ``reference``, step by step. ``suggested``: a schedule, and why."""

    kind = "divergence"
    reference: Text
    steps: Positive
    solver: Text
    guidance: Number
    seeds: tuple[Seed, ...]
    prompts: tuple[Text, ...] = ()
    members: dict[str, tuple[DivergenceStep, ...]]
    orders: tuple[OrderTrial, ...]
    order: Text
    suggested: Text
    reason: Text

    @property
    def key(self) -> str:
        """Of its file: one of fewer seeds or other steps does not take its place."""
        said = [self.reference, self.steps, self.solver, self.guidance, list(self.seeds), list(self.prompts)]
        return digest(said)[:12]


# --- quality: tstitch-trt evaluate


class Measure(_Record, frozen=True, kw_only=True):
    """A metric's value with a bootstrap interval: ``low`` and ``high`` at ``level`` (0.95), ``std`` over resamples.

    ``bias``: the part of ``value`` that more samples would take away, an estimate (``fid``; else 0). ``deviations``: of
    the resamples from their mean, in units of ``std``, float16 little endian (base64 in JSON). Samples from equal seeds
    are resampled alike, so those of two settings give the spread of their difference. Empty where it is unknown.
    """

    value: Number
    low: Number
    high: Number
    std: Number
    bias: Number = 0.0
    deviations: bytes = b""


class Point(_Record, frozen=True, kw_only=True):
    """The results of one setting. ``measures``: by metric (``METRICS``). ``ms``: the whole trajectory of one batch of
    ``batch`` images, median of the batches drawn (0: not timed). ``samples_file``: the ``.npz`` of the pictures."""

    setting: Setting
    samples: Count
    measures: dict[str, Measure]
    batch: Count = 0
    ms: Ms = 0.0
    samples_file: Text = ""


class Evaluation(Study, frozen=True, kw_only=True):
    """``features``: the network, ``reference``: the real images (name, sha256 and count of each).

    ``references``: the settings that paired metrics (``PAIRED``) compare with, one for each solver and guidance: the
    last member alone in the most steps. ``margin``: how much worse still counts as no worse, a share of the last
    member's own value (``tstitch_trt.study.noninferiority``). ``notes``: warnings, such as too few samples for the
    features. ``key``: see ``evaluation_key``.
    """

    kind = "evaluation"
    key: Text = ""
    backend: Text = ""
    device: Text = ""
    threads: Count = 0
    samples: Count
    seed: Seed
    prompts: tuple[Text, ...] = ()
    metrics: tuple[Text, ...]
    features: dict[Text, Text | Count]
    reference: dict[Text, Text | Count]
    level: Number
    resamples: Count
    margin: Margin = MARGIN
    references: tuple[Setting, ...] = ()
    points: tuple[Point, ...]
    notes: tuple[Text, ...] = ()


# --- choice: tstitch-trt search


class SearchPoint(_Record, frozen=True, kw_only=True):
    """``cost_ms``: predicted by the calibration for the search's batch. ``front``: no other is cheaper and as good.

    ``samples``: how many it was judged on before it was dropped (``dropped``) or the search ended. ``kind``: the family
    it belongs to, e.g. ``two members``, ``large-small-large``, ``fewer steps``.
    """

    kind: Text
    setting: Setting
    cost_ms: Ms
    quality: Measure
    samples: Count
    dropped: bool
    front: bool


class Search(Study, frozen=True, kw_only=True):
    """The Pareto set of cost and ``metric``. ``calibration``: the digest of the one that predicted the costs.

    ``reference``: the last member alone in the most steps. Each point is judged by its difference from it, and
    ``margin`` is as in ``Evaluation``.
    """

    kind = "search"
    metric: Text
    batch: Positive
    samples: Count
    seed: Seed
    prompts: tuple[Text, ...] = ()
    calibration: Text
    margin: Margin = MARGIN
    reference: Setting | None = None
    points: tuple[SearchPoint, ...]
    notes: tuple[Text, ...] = ()

    @property
    def key(self) -> str:
        """Of its file: one of fewer samples or another metric does not take its place."""
        return digest([self.metric, self.batch, self.samples, self.seed, list(self.prompts)])[:12]
