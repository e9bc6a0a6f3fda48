"""Does every engine of a bundle compute what its member's ONNX and PyTorch compute? As data.

passed       all outputs were within the limit on all inputs
failed       one was not, the file is damaged, or it is not the engine that the manifest describes
not checked  it can't run on this machine; its identity and, for TensorRT-RTX, the plan's header were checked
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

import msgspec

from tstitch_engines.backends import BACKENDS, open_backend
from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle import Bundle, open_bundle
from tstitch_engines.device import Device, open_device, parse_device
from tstitch_engines.errors import BadEngine, BadInput, FailedWork, Unavailable, unknown_name
from tstitch_engines.identity import check_identity, digest, for_gpu, model_digest
from tstitch_engines.manifest import SCHEMA, EngineRecord, Member, Precision
from tstitch_trt.caller import Arrays, Caller, Error, measure_error
from tstitch_trt.choose import rebuild as rebuild_engines
from tstitch_trt.layers import LayerCheck, compare_layers
from tstitch_trt.references import References

__all__ = ["LIMITS", "Comparison", "EngineCheck", "Verification", "verify"]

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
Report = Callable[[float, str], object]  # share done in 0..1, what is being checked


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One output against one reference at one batch size: the worst of ``samples`` calls."""

    against: Literal["onnxruntime", "torch"]
    inputs: Literal["random", "trajectory"]
    batch: int
    samples: int
    tensor: str
    error: Error
    passed: bool


class EngineCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``reason``: why it failed or was not checked. ``plan``: what a TensorRT-RTX plan's header says."""

    member: str
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


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """``references``: version by name, or why a reference was left out. ``layers``: only where asked for."""

    bundle: str
    references: dict[str, str]
    engines: tuple[EngineCheck, ...]
    layers: tuple[LayerCheck, ...] = ()

    def of(self, status: Status) -> list[EngineCheck]:
        return [check for check in self.engines if check.status == status]


def verify(
    bundle: str | Path | Bundle,
    *,
    backend: str | None = None,
    members: Sequence[str] | None = None,
    samples: int = 2,
    seed: int = 0,
    threads: int = 0,
    layers: bool = False,
    device: str = "cuda",
    checkpoints: Mapping[str, Path] | None = None,
    rebuild: bool = False,
    report: Report = lambda share, text: None,
) -> Verification:
    """Checks every engine of ``bundle``, or those of one backend or of some members.

    Inputs are random, and recorded from a short trajectory of the bundle over all noise levels with guidance on; at the
    smallest, tuned and largest batch of each engine, ``samples`` calls of each kind (fewer where few batches hold the
    whole trajectory). PyTorch is left out where it is not installed or has no module for the member.

    ``layers``: also look for the first layer that differs: between an ONNX Runtime engine and the ONNX it was compiled
    from, and between an fp16 graph and the same graph widened to float32.

    ``checkpoints``: what members were made from; their PyTorch side is then the family's module on the checkpoint
    itself, and not the weights of the graph, from which only DiTs in the published layout can be made again.

    ``device``: where engines for GPUs run; ``cpu`` leaves them unchecked. ``rebuild``: engines of every backend that
    runs here, or of ``backend``, are compiled again first where they are missing, damaged or don't fit.

    Raises ``BadBundle`` for a damaged bundle, ``BadInput`` and its kinds for a selection that matches nothing,
    ``Unavailable`` without ONNX Runtime when an engine can run here, ``NotFinite`` when the members' own graphs give
    NaN.
    """
    if samples < 1:
        raise BadInput(f"samples = {samples}; allowed is 1 or more", hint="e.g. --samples 4")
    if threads < 0:
        raise BadInput(f"threads = {threads}; allowed is 0 (all cores) or more", hint="e.g. --threads 4")
    parse_device(device)
    given = dict(checkpoints or {})
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle), engines=not rebuild)
    if rebuild:
        opened = _rebuilt(opened, backend, members, device, report)
    chosen = _select(opened, backend, members)
    for name in given:
        if name not in opened.manifest.members:
            raise unknown_name("member", name, opened.manifest.members)
    checks: list[EngineCheck] = []
    found: list[LayerCheck] = []
    notes: dict[str, str] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tstitch-verify-")))
        references: References | None = None
        for index, (name, record) in enumerate(chosen):
            what = f"{name}, {record.identity.backend}"
            report(index / len(chosen), what)
            subject = _Subject(opened, name, record, device, threads)
            status, reason = subject.open()
            comparisons: tuple[Comparison, ...] = ()
            if subject.caller is not None:
                stack.callback(subject.close)
                if references is None:
                    report(index / len(chosen), "recording a trajectory")
                    largest = max(record.identity.profile.dims["B"].max for _, record in chosen)
                    references = References(
                        opened,
                        largest=largest,
                        samples=samples,
                        seed=seed,
                        threads=threads,
                        folder=folder,
                        checkpoints=given,
                    )
                    stack.callback(references.close)
                    notes["onnxruntime"] = references.version
                try:
                    comparisons = _compare(subject, references, notes, lambda: report(index / len(chosen), what))  # noqa: B023
                    status, reason = _verdict(comparisons, subject.limit)
                except FailedWork as error:
                    status, reason = "failed", f"running it failed: {error.message}"
                subject.close()
            checks.append(subject.check(status, reason, comparisons))
        if layers:
            report(1.0, "looking for the first layer that differs")
            found = _layers(opened, chosen, references, folder, samples=samples, seed=seed, threads=threads)
    return Verification(bundle=str(opened.root), references=notes, engines=tuple(checks), layers=tuple(found))


class _Subject:
    """One engine under test. ``caller`` is ``None`` until ``open`` has found that it can run here."""

    def __init__(self, bundle: Bundle, name: str, record: EngineRecord, gpu: str, threads: int) -> None:
        self.name = name
        self.record = record
        self.member: Member = bundle.manifest.members[name]
        self.limit, self.why = LIMITS[self.member.precision]
        self.caller: Caller | None = None
        self.plan: str | None = None
        self._bundle = bundle
        self._gpu = gpu  # cpu: leave out
        self._threads = threads

    def open(self) -> tuple[Status, str | None]:
        """The status as far as it is known before the engine has run. Raises nothing that is about this engine."""
        try:
            self._check_record()
        except BadEngine as error:
            return "failed", error.message
        try:
            engine, device = self._load()
        except Unavailable as error:
            return "not checked", error.message
        except _NotForHere as error:
            return "not checked", str(error)
        except BadEngine as error:
            return "failed", error.message
        self.caller = Caller(engine, device)
        return "passed", None

    def _check_record(self) -> None:
        """What is known without running it: that the manifest's records and the plan's header agree."""
        identity, member = self.record.identity, self.member
        want = msgspec.structs.replace(
            identity, schema=SCHEMA, onnx_sha256=model_digest(member.onnx), precision=member.precision
        )
        check_identity(identity, want, what=f"the {identity.backend} engine", rebuild=self._again)
        if identity.backend != "tensorrt-rtx":
            return
        from tstitch_engines.backends.tensorrt import read_plan_header
        from tstitch_engines.backends.tensorrt.flavour import RTX
        from tstitch_engines.backends.tensorrt.options import DEFAULT_LIST
        from tstitch_engines.backends.tensorrt.plan import check_plan

        path = self._bundle.path(self.record.files[0])
        check_plan(RTX, identity.backend_version, path, None)
        header = read_plan_header(path)
        assert header is not None, "check_plan has read it"
        self.plan = f"TensorRT-RTX {header.version}, compute capability {header.gpus()}"
        listed = ",".join(f"sm_{major}{minor}" for major, minor in header.capabilities)
        if identity.arch not in (DEFAULT_LIST, listed):
            raise BadEngine(f"the plan is for {listed}, the manifest says {identity.arch}", hint=self._again)

    @property
    def _again(self) -> str:
        return self._bundle.compile_command(self.record.identity.backend, _place(self.record, self._gpu))

    def _load(self) -> tuple[Engine, Device]:
        identity = self.record.identity
        backend = open_backend(identity.backend)
        if (place := _place(self.record, self._gpu)) == "cpu" and for_gpu(identity.backend, identity.arch):
            raise _NotForHere(f"it is for GPUs ({identity.arch}), and the device asked for is {self._gpu}")
        device = open_device(place)
        arch = backend.arch(device.name)
        path = self._bundle.path(self.record.files[0])
        try:
            check_identity(identity, backend.here(identity, arch), what="it", rebuild=self._again)
            if identity.backend == "tensorrt-rtx":
                from tstitch_engines.backends.tensorrt import read_plan_header

                header, number = read_plan_header(path), int(arch.removeprefix("sm_"))
                if header is not None and not header.runs_on((number // 10, number % 10)):
                    raise _NotForHere(f"the plan is for compute capability {header.gpus()}; this GPU is {arch}")
        except BadEngine as error:
            raise _NotForHere(error.message) from None
        engine = backend.load(path, member=self.member, identity=identity, device=device, threads=self._threads)
        return engine, device

    def check(self, status: Status, reason: str | None, comparisons: tuple[Comparison, ...]) -> EngineCheck:
        identity = self.record.identity
        return EngineCheck(
            member=self.name,
            backend=identity.backend,
            backend_version=identity.backend_version,
            arch=identity.arch,
            precision=identity.precision,
            identity=digest(identity),
            status=status,
            reason=reason,
            plan=self.plan,
            limit=self.limit,
            limit_reason=self.why,
            comparisons=comparisons,
        )

    def close(self) -> None:
        if self.caller is not None:
            self.caller.close()
        self.caller = None


class _NotForHere(Exception):
    """A sound engine for another machine or version."""


def _place(record: EngineRecord, gpu: str) -> str:
    return gpu if for_gpu(record.identity.backend, record.identity.arch) else "cpu"


def _rebuilt(bundle: Bundle, backend: str | None, members: Sequence[str] | None, device: str, report: Report) -> Bundle:
    """``bundle`` with fitting engines of ``backend``, or of every backend it has engines of that runs here."""
    names = list(bundle.manifest.members if members is None else members)
    every = [
        record for name in names if name in bundle.manifest.members for record in bundle.manifest.members[name].engines
    ]
    _select(bundle, backend if any(r.identity.backend == backend for r in every) else None, members)  # checks the names

    def progress(phase: str, share: float) -> None:
        report(0.0, f"compiling {phase}")

    for one in dict.fromkeys(r.identity.backend for r in every) if backend is None else (backend,):
        known = next((record.identity for record in every if record.identity.backend == one), None)
        place = device if for_gpu(one, known.arch if known is not None else "") else "cpu"
        try:
            library = open_backend(one)
            library.arch(place)
        except Unavailable:
            if backend is not None:
                raise
            continue  # listed as not checked, with the reason
        bundle = rebuild_engines(bundle, library, place, names=names, progress=progress)
    return bundle


def _select(bundle: Bundle, backend: str | None, members: Sequence[str] | None) -> list[tuple[str, EngineRecord]]:
    manifest = bundle.manifest
    if backend is not None and backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if members is not None and not members:
        raise BadInput(
            f"no member is given; known: {', '.join(manifest.members)}",
            hint=f"e.g. --members {next(iter(manifest.members))}",
        )
    for name in members or ():
        if name not in manifest.members:
            raise unknown_name("member", name, manifest.members)
    wanted = manifest.members if members is None else dict.fromkeys(members)
    every = [(name, record) for name in wanted for record in manifest.members[name].engines]
    chosen = [(name, record) for name, record in every if backend in (None, record.identity.backend)]
    if not chosen:
        have = sorted({record.identity.backend for _, record in every})
        raise BadInput(
            f"the bundle {bundle.root} has no {backend + ' ' if backend else ''}engine of {', '.join(wanted)}; it has: "
            f"{', '.join(have) or 'none'}",
            hint=f"verify --backend {have[0]}, or build one: {bundle.rebuild_command} --backend {backend}"
            if backend and have
            else f"build them: {bundle.rebuild_command}",
        )
    return chosen


def _compare(
    subject: _Subject, references: References, notes: dict[str, str], tick: Callable[[], object]
) -> tuple[Comparison, ...]:
    name, caller = subject.name, subject.caller
    assert caller is not None
    against: dict[Literal["onnxruntime", "torch"], Callable[[str, Arrays], Arrays]] = {"onnxruntime": references.onnx}
    try:
        notes["torch"] = references.torch_version(name)
        against["torch"] = references.torch
    except Unavailable as reason:
        notes.setdefault("torch", f"left out: {reason.message} ({reason.hint})")
    sizes = caller.engine.profile.dims["B"]
    found: list[Comparison] = []
    for batch in sorted({sizes.min, sizes.opt, sizes.max}):
        drawn: dict[Literal["random", "trajectory"], list[Arrays]] = {
            "random": references.random(name, batch),
            "trajectory": references.trajectory(name, batch),
        }
        for kind, calls in drawn.items():
            worst: dict[tuple[Literal["onnxruntime", "torch"], str], Error] = {}
            got = []
            for inputs in calls:
                tick()
                got.append(caller(inputs))
            # One library after the other: threads of one that wait for work would slow the next one down.
            for other, run in against.items():
                for inputs, outputs in zip(calls, got, strict=True):
                    tick()
                    for tensor, want in run(name, inputs).items():
                        error = measure_error(outputs[tensor], want)
                        before = worst.get((other, tensor))
                        worst[other, tensor] = error if before is None else before.worse(error)
            found += [
                Comparison(
                    against=other,
                    inputs=kind,
                    batch=batch,
                    samples=len(calls),
                    tensor=tensor,
                    error=largest,
                    passed=largest.within(subject.limit),
                )
                for (other, tensor), largest in worst.items()
            ]
    return tuple(found)


def _verdict(comparisons: Sequence[Comparison], limit: float) -> tuple[Status, str | None]:
    bad = [c for c in comparisons if not c.passed]
    if not bad:
        return "passed", None
    worst = max(
        bad, key=lambda c: float("inf") if c.error.max_rel is None else max(c.error.max_rel, c.error.rel_l2 or 0)
    )
    return "failed", (
        f"{worst.tensor} differs from {worst.against} on {worst.inputs} inputs at batch {worst.batch}: {worst.error}; "
        f"allowed is {limit:.0e} ({len(bad)} of {len(comparisons)} comparisons failed)"
    )


def _layers(
    bundle: Bundle,
    chosen: Sequence[tuple[str, EngineRecord]],
    references: References | None,
    folder: Path,
    *,
    samples: int,
    seed: int,
    threads: int,
) -> list[LayerCheck]:
    made = references is None
    if references is None:
        references = References(bundle, largest=1, samples=samples, seed=seed, threads=threads, folder=folder)
    try:
        return [
            check
            for name in dict.fromkeys(name for name, _ in chosen)
            for check in compare_layers(
                bundle,
                name,
                [record for other, record in chosen if other == name],
                references.trajectory(name, 2)[0],
                LIMITS[bundle.manifest.members[name].precision][0],
                folder,
            )
        ]
    finally:
        if made:
            references.close()
