"""Compares every engine of a bundle with its network's ONNX and PyTorch.

passed       all outputs were within the limit on all inputs
failed       one was not, the file is damaged, or it is not the engine that the manifest describes
not checked  it can't run on this machine; its identity and, for TensorRT-RTX, the plan's header were checked
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.backends import BACKENDS, for_gpu, open_backend
from tstitch_engines.bundle.bundle import Bundle, check_bundle, open_bundle, require_vouched
from tstitch_engines.bundle.manifest import EngineRecord, Manifest
from tstitch_engines.checks import (
    check_callable,
    check_checkpoints,
    check_path,
    check_switch,
    check_text,
    check_whole,
    checked,
    items_of,
    optional,
    taken_as_is,
)
from tstitch_engines.child import Channel, Job, Limits, run_in_child
from tstitch_engines.compile.select import rebuild as rebuild_engines
from tstitch_engines.device.open import parse_device
from tstitch_engines.errors import BadInput, Unavailable, unknown_name
from tstitch_engines.progress import Progress, silent
from tstitch_engines.threads import check_threads
from tstitch_trt.request.limits import MOST_SEED
from tstitch_trt.verify.compare import LIMITS, Comparison, EngineCheck, Status, usual_sizes
from tstitch_trt.verify.engine_check import check_engine
from tstitch_trt.verify.layers import LayerCheck, compare_layers
from tstitch_trt.verify.references import References

__all__ = ["LIMITS", "Comparison", "EngineCheck", "Verification", "verify"]

_SECONDS: Final = 3600.0  # the limit of one engine unless another is given: large ones run for minutes on a CPU


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """``references``: version by name, or why a reference was left out. ``layers``: only where asked for."""

    bundle: str
    references: dict[str, str]
    engines: tuple[EngineCheck, ...]
    layers: tuple[LayerCheck, ...] = ()

    def of(self, status: Status) -> list[EngineCheck]:
        return [check for check in self.engines if check.status == status]


@checked(
    bundle=check_bundle,
    backend=optional(partial(check_text, example="onnxruntime", most=100)),
    members=optional(items_of(partial(check_text, example="large", most=1000))),
    samples=partial(check_whole, low=1, high=10_000),
    seed=partial(check_whole, high=MOST_SEED),
    threads=check_threads,
    layers=check_switch,
    device=partial(check_text, example="cuda", most=100),
    checkpoints=optional(check_checkpoints),
    rebuild=check_switch,
    trust=check_switch,
    require_signature=optional(check_path),
    progress=check_callable,
    time_limit=taken_as_is,
    memory_limit=taken_as_is,
)
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
    checkpoints: Mapping[str, str | Path] | None = None,
    rebuild: bool = False,
    trust: bool = False,
    require_signature: str | Path | None = None,
    progress: Progress = silent,
    time_limit: float | str | None = None,
    memory_limit: int | str | None = None,
) -> Verification:
    """Checks every engine of ``bundle``, or those of one backend or of some members and parts.

    Inputs are random, and recorded from a short guided trajectory over all noise levels, from the prompt's tokens to
    the pictures. There are ``samples`` calls of each kind (fewer where few batches hold the whole trajectory) at the
    smallest, tuned and largest batch of each engine, and at its smallest and largest sizes. PyTorch is left out where
    it is not installed or has no module for the network.

    ``layers``: also find the first layer that differs between an ONNX Runtime engine and its ONNX, and between an fp16
    graph and the same graph in float32, and list the compiled layers of TensorRT engines with what is suspicious in
    them: as a loaded plan tells them, else as a build in detailed verbosity kept them. ``checkpoints``: the origins of
    members and parts, paths or Hugging Face repositories. Their PyTorch side is then the family's module with the
    checkpoint's weights, not the graph's, which works for DiTs in the published layout only. ``device``: where engines
    for GPUs run; ``cpu`` leaves them unchecked. ``rebuild``: first compiles engines that are missing, damaged or don't
    fit, of every backend that runs here or of ``backend``.

    ``trust``: also load engines that may run code and that this machine did not compile; those of ``backend`` are
    loaded without it. ``require_signature``: as of ``tstitch_trt.load``.

    Engines and references run in a child process, since a graph may be made to run or grow without end. It is ended
    when one engine takes longer than ``time_limit`` (seconds, or ``30m``; an hour by default) or when it holds more
    than ``memory_limit`` (bytes, or ``8GiB``; by default what is free when it starts). Compiling has the same limits.

    Raises ``BadBundle`` for a damaged bundle, ``BadInput`` and its kinds for a selection that matches nothing,
    ``Unavailable`` without ONNX Runtime when an engine can run here, ``NotFinite`` when the members' own graphs give
    NaN, ``OutOfTime`` and ``OutOfMemory`` at the limits.
    """
    limits = Limits.of(time_limit, memory_limit)
    parse_device(device)
    trusted = trust or backend is not None
    if isinstance(bundle, Bundle):
        opened = require_vouched(bundle, require_signature)
    else:
        opened = open_bundle(Path(bundle), engines=not rebuild, require_signature=require_signature)
    if rebuild:
        opened = _rebuilt(opened, backend, members, device, progress, limits, trusted=trusted)
    chosen = _select(opened, backend, members)
    for name in checkpoints or {}:
        if name not in opened.manifest.networks():
            raise unknown_name("member", name, opened.manifest.networks())
    on_gpu = device != "cpu" and any(for_gpu(one.identity.backend, one.identity.arch) for _, one in chosen)
    with tempfile.TemporaryDirectory(prefix="tstitch-verify-") as folder:
        request = VerifyRequest(
            root=str(opened.root.absolute()),
            manifest=opened.manifest,
            chosen=tuple(chosen),
            samples=samples,
            seed=seed,
            threads=threads,
            layers=layers,
            device=device,
            trusted=trusted,
            vouched=opened.vouched,
            checkpoints=_located(checkpoints or {}, opened.manifest.members, progress),
            folder=folder,
        )
        job = Job(
            what=f"the process that verifies {opened.root.name}",
            seconds=_SECONDS,
            limits=limits,
            if_killed="free memory, or verify some engines at a time: --members NAME",
            kept=not on_gpu,  # a GPU's memory is given back
            host_only=not on_gpu,
            temporary=Path(folder),
        )
        found = run_in_child(verify_here, request, job, progress=progress)
    return msgspec.structs.replace(found, bundle=str(opened.root))


def _located(given: Mapping[str, str | Path], members: Collection[str], progress: Progress) -> dict[str, str]:
    """Where the checkpoints are."""
    if not given:
        return {}
    from tstitch_export.hub.checkpoints import Checkpoints
    from tstitch_export.planning.network import part_of

    checkpoints = Checkpoints(progress)
    kinds = {name: "member" if name in members else part_of(name) for name in given}
    return {name: str(checkpoints.locate(one, kinds[name]).absolute()) for name, one in given.items()}


class VerifyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is to check: ``chosen`` engines with the networks they are of. ``trusted``: see
    ``compile.load``. ``folder``: for temporary files.
    """

    root: str
    manifest: Manifest
    chosen: tuple[tuple[str, EngineRecord], ...]
    samples: int
    seed: int
    threads: int
    layers: bool
    device: str
    trusted: bool
    vouched: bool
    checkpoints: dict[str, str]
    folder: str


def verify_here(request: VerifyRequest, channel: Channel) -> Verification:
    """Verifies in this process, which is the child. The limit of time is of each engine."""
    opened, folder, chosen = (
        Bundle(Path(request.root), request.manifest, vouched=request.vouched),
        Path(request.folder),
        request.chosen,
    )
    checks: list[EngineCheck] = []
    found: list[LayerCheck] = []
    with ExitStack() as stack:
        made: list[References] = []  # with the first engine that runs here

        def references() -> References:
            if not made:
                checkpoints = {name: Path(path) for name, path in request.checkpoints.items()}
                made.append(References(opened, request.samples, request.seed, request.threads, folder, checkpoints))
                stack.callback(made[0].close)
            return made[0]

        for index, (name, record) in enumerate(chosen):
            channel.lap()
            tick = partial(lambda share, text: channel.progress(text, share), index / len(chosen))
            tick(f"{name}, {record.identity.backend}")
            check = check_engine(
                *(opened, name, record, references),
                gpu=request.device,
                threads=request.threads,
                trusted=request.trusted,
                layers=request.layers,
                tick=tick,
            )
            checks.append(check)
        if request.layers:
            channel.lap()
            channel.progress("looking for the first layer that differs", 1.0)
            found = _layers(opened, chosen, references(), folder)
    notes = made[0].notes if made else {}
    return Verification(bundle=request.root, references=notes, engines=tuple(checks), layers=tuple(found))


def _rebuilt(
    bundle: Bundle,
    backend: str | None,
    members: Sequence[str] | None,
    device: str,
    progress: Progress,
    limits: Limits,
    *,
    trusted: bool,
) -> Bundle:
    """``bundle`` with fitting engines of ``backend``, or of every backend it has engines of that runs here."""
    networks = bundle.manifest.networks()
    names = list(networks if members is None else members)
    every = [record for name in names if name in networks for record in networks[name].engines]
    _select(bundle, backend if any(r.identity.backend == backend for r in every) else None, members)  # checks the names

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
        bundle = rebuild_engines(
            bundle,
            library,
            place,
            names=names,
            trusted=trusted,
            progress=lambda phase, share: progress(f"compiling {phase}", 0.0),
            limits=limits,
        )
    return bundle


def _select(bundle: Bundle, backend: str | None, members: Sequence[str] | None) -> list[tuple[str, EngineRecord]]:
    networks = bundle.manifest.networks()
    if backend is not None and backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if members is not None and not members:
        raise BadInput(
            f"no member is given; known: {', '.join(networks)}", hint=f"e.g. --members {next(iter(networks))}"
        )
    for name in members or ():
        if name not in networks:
            raise unknown_name("member", name, networks)
    wanted = networks if members is None else dict.fromkeys(members)
    every = [(name, record) for name in wanted for record in networks[name].engines]
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


def _layers(
    bundle: Bundle, chosen: Sequence[tuple[str, EngineRecord]], references: References, folder: Path
) -> list[LayerCheck]:
    found: list[LayerCheck] = []
    for name in dict.fromkeys(name for name, _ in chosen):
        records = [record for other, record in chosen if other == name]
        calls = references.trajectory(name, 2)
        if not calls:
            sizes = {**usual_sizes(bundle.manifest, records[0].identity.profile), "B": 2}
            calls = references.random(name, sizes)
        limit = LIMITS[bundle.manifest.networks()[name].precision][0]
        found += compare_layers(bundle, name, records, calls[0], limit, folder)
    return found
