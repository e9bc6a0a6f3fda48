"""Compares an engine's outputs with those of the references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from tstitch_engines.bundle.manifest import Manifest, Precision
from tstitch_engines.errors import OutOfProfile
from tstitch_engines.host_call import Arrays, HostRunner, sizes_of
from tstitch_engines.spec import ShapeProfile
from tstitch_trt.verify.error import Error, measure_error
from tstitch_trt.verify.plan_layers import LayerList

if TYPE_CHECKING:
    from tstitch_trt.verify.references import References

__all__ = ["LIMITS", "Comparison", "EngineCheck", "Status", "compare", "draw_inputs", "usual_sizes", "verdict"]

# Largest allowed difference, as a share of the reference's largest magnitude and as relative L2, and why: fp32 and fp16
# as at export.
LIMITS: Final[dict[Precision, tuple[float, str]]] = {
    "fp32": (1e-4, "float32 rounding where sums are taken in another order"),
    "fp16": (3e-2, "every product is rounded to 11 bits, and a deep network adds up hundreds of such roundings"),
    "bf16": (1e-1, "activations are rounded to 8 bits, in fp16 to 11; the references compute in float32"),
    "int8": (1e-1, "a value near the middle of two 8-bit steps goes to either, and later layers add that up"),
    "fp8": (1e-1, "a value near the middle of two 8-bit steps goes to either, and later layers add that up"),
}

Status = Literal["passed", "failed", "not checked"]
Reference = Literal["onnxruntime", "torch"]
Kind = Literal["random", "trajectory"]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One output against one reference at one batch and size: the worst of ``samples`` calls.

    ``sizes``: of the dynamic dimensions besides the batch.
    """

    against: Reference
    inputs: Kind
    batch: int
    sizes: dict[str, int] = {}
    samples: int
    tensor: str
    error: Error
    passed: bool


class EngineCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``member``: its name, ``kind``: what it is. ``reason``: why it failed or was not checked. ``plan``: what a
    TensorRT-RTX plan's header says. ``layers``: of a TensorRT engine, where asked for; or why there are none.
    """

    member: str
    kind: Literal["member", "part"] = "member"
    backend: str
    backend_version: str
    arch: str
    precision: Precision
    identity: str
    status: Status
    reason: str | None
    plan: str | None
    limit: float
    limit_reason: str
    comparisons: tuple[Comparison, ...]
    layers: LayerList | str | None = None


CallGroups = list[tuple[Kind, list[Arrays]]]
"""Lists of calls, each of one kind, batch and size."""


def draw_inputs(references: References, manifest: Manifest, name: str, profile: ShapeProfile) -> CallGroups:
    """The inputs of an engine of the network ``name`` with this profile.

    At the usual sizes (``usual_sizes``) random and recorded ones at the smallest, tuned and largest batch. If they
    differ from the usual sizes, also both at the smallest and random ones at the largest sizes. Raises ``NotFinite``
    when the bundle's own graphs give NaN.
    """
    network, batches = manifest.networks()[name], profile.dims["B"]
    usual = usual_sizes(manifest, profile)
    cases = [(usual, batch) for batch in sorted({batches.min, batches.opt, batches.max})]
    spans = {dim: (span, network.multiples.get(dim, 1)) for dim, span in profile.dims.items() if dim != "B"}
    least = {dim: -(-span.min // by) * by for dim, (span, by) in spans.items()}
    most = {dim: span.max // by * by for dim, (span, by) in spans.items()}
    cases += [(other, batches.min) for other in (least, most) if other != usual]
    found: CallGroups = []
    for sizes, batch in cases:
        found.append(("random", references.random(name, {**sizes, "B": batch})))
        if sizes != usual and (sizes != least or _sides(sizes) == _sides(usual)):
            continue  # a trajectory at the largest size takes long, and one at the usual size is there already
        calls = references.trajectory(name, batch, _sides(sizes))
        try:
            for call in calls[:1]:
                profile.check(sizes_of(network.inputs, call), what="engine")
        except OutOfProfile as reason:
            references.leave_out(f"recorded inputs of {name}", reason)
            continue
        if calls:
            found.append(("trajectory", calls))
    return found


def usual_sizes(manifest: Manifest, profile: ShapeProfile) -> dict[str, int]:
    """All dimensions but the batch: the bundle's own where the profile has it, else the one it is tuned for."""
    own = {"H": manifest.latent.height, "W": manifest.latent.width}
    return {
        name: own[name] if name in own and allowed.min <= own[name] <= allowed.max else allowed.opt
        for name, allowed in profile.dims.items()
        if name != "B"
    }


def _sides(sizes: dict[str, int]) -> tuple[int, int] | None:
    return (sizes["H"], sizes["W"]) if {"H", "W"} <= sizes.keys() else None


def compare(
    name: str,
    runner: HostRunner,
    references: References,
    groups: CallGroups,
    *,
    limit: float,
    tick: Callable[[], object],
) -> tuple[Comparison, ...]:
    """Compares every output on every input."""
    against: dict[Reference, Callable[[str, Arrays], Arrays]] = {"onnxruntime": references.onnx}
    if references.runs_torch(name):
        against["torch"] = references.torch
    found: list[Comparison] = []
    for kind, calls in groups:
        worst: dict[tuple[Reference, str], Error] = {}
        got = []
        for inputs in calls:
            tick()
            got.append(runner(inputs))
        # One library after the other: threads of one that wait for work would slow the next one down.
        for other, run in against.items():
            for inputs, outputs in zip(calls, got, strict=True):
                tick()
                for tensor, want in run(name, inputs).items():
                    error = measure_error(outputs[tensor], want)
                    before = worst.get((other, tensor))
                    worst[other, tensor] = error if before is None else before.worse(error)
        sizes = sizes_of(runner.engine.inputs, calls[0])
        batch = sizes.pop("B")
        found += [
            Comparison(
                against=other,
                inputs=kind,
                batch=batch,
                sizes=sizes,
                samples=len(calls),
                tensor=tensor,
                error=largest,
                passed=largest.within(limit),
            )
            for (other, tensor), largest in worst.items()
        ]
    return tuple(found)


def verdict(comparisons: Sequence[Comparison], limit: float) -> tuple[Status, str | None]:
    bad = [c for c in comparisons if not c.passed]
    if not bad:
        return "passed", None
    worst = max(
        bad, key=lambda c: float("inf") if c.error.max_rel is None else max(c.error.max_rel, c.error.rel_l2 or 0)
    )
    at = "".join(f", {name} {size}" for name, size in worst.sizes.items())
    return "failed", (
        f"{worst.tensor} differs from {worst.against} on {worst.inputs} inputs at batch {worst.batch}{at}: "
        f"{worst.error}; "
        f"allowed is {limit:.0e} ({len(bad)} of {len(comparisons)} comparisons failed)"
    )
