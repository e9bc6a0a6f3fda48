"""What commands print with ``--json``: one record for each, in the order of the commands.

Fields may be added in later versions; none changes its meaning or goes away without a new major version. A field that
may be absent is ``UNSET`` here then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from tstitch_engines.bundle.manifest import EngineRecord, Manifest, Member, Network, Quantisation
from tstitch_trt.bench.bench import Bench
from tstitch_trt.cli._drawn import BulkOutput, SampleOutput
from tstitch_trt.demo import Demo
from tstitch_trt.doctor import Examination
from tstitch_trt.study.evaluate.claim import Claim
from tstitch_trt.study.records import Calibration, Divergence, Evaluation, Search
from tstitch_trt.verify.plan_layers import LayerList
from tstitch_trt.verify.verify import Verification

__all__ = [
    "DOCUMENTS",
    "BuildOutput",
    "CacheEntry",
    "CacheOutput",
    "CachePruned",
    "ClaimText",
    "ConfigOutput",
    "DemoOutput",
    "EvaluateOutput",
    "InspectOutput",
    "InspectedEngine",
    "InspectedMember",
    "InspectedPart",
    "PlanFacts",
    "QuantiseOutput",
    "RecipeEntry",
    "RemovedEntry",
    "ReportOutput",
    "SetOption",
    "SignOutput",
    "StaleStudy",
    "TritonOutput",
    "UsedStudy",
    "json_schema",
]


# --- bundles


class BuildOutput(Manifest, frozen=True, kw_only=True):
    """The manifest of the bundle, and its path."""

    bundle: str


class RecipeEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    members: list[str]
    description: str


class PlanFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the header of a TensorRT-RTX plan says: its version, and the compute capabilities it runs on."""

    version: str
    gpus: str


class InspectedEngine(EngineRecord, frozen=True, kw_only=True):
    """``digest``: of its identity. ``graphs``: the graph mode it runs in.

    With ``--layers``: its ``layers``, or why there are none.
    """

    digest: str
    graphs: str
    layers: LayerList | UnsetType | None = UNSET
    no_layers: str | UnsetType | None = UNSET
    plan: PlanFacts | UnsetType = UNSET


class InspectedMember(Member, frozen=True, kw_only=True):
    engines: tuple[InspectedEngine, ...]


class InspectedPart(Network, frozen=True, kw_only=True):
    engines: tuple[InspectedEngine, ...]


class InspectOutput(Manifest, frozen=True, kw_only=True):
    """The manifest and what is computed from it. ``memory``: bytes by backend and purpose. ``signed``: by whom."""

    path: str
    bytes: int
    files: int
    memory: dict[str, dict[str, int]]
    signed: str
    members: dict[str, InspectedMember]  # type: ignore[assignment] # the records are frozen
    parts: dict[str, InspectedPart]  # type: ignore[assignment]


class SignOutput(msgspec.Struct, frozen=True, kw_only=True):
    """``signature``: the file. ``key``: fingerprint of the public key."""

    bundle: str
    signature: str
    key: str


class QuantiseOutput(Quantisation, frozen=True, kw_only=True):
    """The new bundle, its 8-bit member, and what quantising cost."""

    bundle: str
    member: str
    precision: str


class TritonOutput(msgspec.Struct, frozen=True, kw_only=True):
    """``folder``: of the model, in the model ``repository``."""

    model: str
    folder: str
    repository: str


# --- studies and reports


class DemoOutput(Demo, frozen=True, kw_only=True):
    """``samples``: images of each point. ``claim``: up to which fraction the pictures are no worse than at the first.

    ``grid``: the picture file. ``bundle_path``: where the built bundle is kept.
    """

    bundle_path: str
    grid: str


class ClaimText(Claim, frozen=True, kw_only=True):
    """``text``: the claim as a sentence."""

    sentence: str = msgspec.field(name="text")


class EvaluateOutput(Evaluation, frozen=True, kw_only=True):
    """The study that is kept in the bundle, and what can be claimed from it."""

    claims: tuple[ClaimText, ...]


class UsedStudy(msgspec.Struct, frozen=True, kw_only=True):
    study: str
    made: str


class StaleStudy(UsedStudy, frozen=True, kw_only=True):
    """``members``: whose weights are other ones now."""

    members: list[str]


class ReportOutput(msgspec.Struct, frozen=True, kw_only=True):
    """``report``: the file. ``images``: the samples in it."""

    report: str
    bytes: int
    bundle: str
    made: str
    images: int
    studies: list[UsedStudy]
    stale: list[StaleStudy]


# --- this machine


class CacheEntry(msgspec.Struct, frozen=True, kw_only=True):
    """``used``: when last, in seconds since 1970. ``seconds``: what making it took, where that is known."""

    key: str
    what: str
    bytes: int
    used: float
    seconds: float | None


class CacheOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The cache in ``path``, of ``bytes`` altogether."""

    path: str
    bytes: int
    entries: list[CacheEntry]


class RemovedEntry(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    what: str
    bytes: int


class CachePruned(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed, and the ``bytes`` that it had."""

    removed: list[RemovedEntry]
    bytes: int


class SetOption(msgspec.Struct, frozen=True, kw_only=True):
    """``source``: ``file``, or the variable of the environment."""

    command: str
    option: str
    value: str | int | float | bool | list[str]
    source: str


class ConfigOutput(msgspec.Struct, frozen=True, kw_only=True):
    """``file``: where defaults are looked for, ``null`` for nowhere. ``variables``: those of the package itself."""

    file: str | None
    exists: bool
    values: list[SetOption]
    variables: dict[str, str]


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of all documents: ``$defs`` by record; ``documents`` has a reference for each command."""
    references, records = msgspec.json.schema_components(DOCUMENTS.values(), ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "documents": dict(zip(DOCUMENTS, references, strict=True)),
        "$defs": records,
    }


DOCUMENTS: Final[Mapping[str, Any]] = {
    "demo": DemoOutput,
    "build": BuildOutput,
    "build --list": list[RecipeEntry],
    "sample": SampleOutput,
    "sample --ray": BulkOutput,
    "bench": Bench,
    "calibrate": Calibration,
    "profile": Divergence,
    "inspect": InspectOutput,
    "sign": SignOutput,
    "verify": Verification,
    "evaluate": EvaluateOutput,
    "search": Search,
    "cache list": CacheOutput,
    "cache prune": CachePruned,
    "cache clear": CachePruned,
    "quantise": QuantiseOutput,
    "export-triton": TritonOutput,
    "report": ReportOutput,
    "config": ConfigOutput,
    "doctor": Examination,
}
"""The document of each command that has ``--json``."""
