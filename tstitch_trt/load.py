"""From a bundle on disk to a runtime."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import msgspec

from tstitch_engines.backends import Backend, Engine, open_backend
from tstitch_engines.bundle import Bundle, open_bundle
from tstitch_engines.device import Device, open_device
from tstitch_engines.errors import BadEngine, BadInput
from tstitch_engines.identity import check_identity, model_digest
from tstitch_engines.manifest import SCHEMA, EngineIdentity, EngineRecord
from tstitch_trt.graphs import GraphMode, check_mode
from tstitch_trt.runtime import Runtime

__all__ = ["load"]


def load(
    bundle: str | Path | Bundle,
    *,
    device: str = "cpu",
    backend: str | None = None,
    threads: int = 0,
    verify: Literal["full", "size"] = "full",
    graph: GraphMode = "step",
    stream: Any = None,
) -> Runtime:
    """Loads all members of a bundle and returns the runtime that samples from them.

    ``device``: ``cpu``, ``cuda`` or ``cuda:N`` (CUDA: not run on a GPU). ``backend``: one the bundle has engines of;
    by default the first it was built for. ``threads``: CPU threads of the engines, 0 for all cores. ``verify``:
    ``full`` checks every file's sha256, ``size`` only sizes.

    ``graph`` (CUDA): ``step`` records each kind of step once and replays it, ``segment`` replays all equal steps in a
    row with one launch, ``off`` runs call by call. ``stream`` (CUDA): a stream to work on, an object with
    ``__cuda_stream__`` or an integer handle, not a default stream; its owner keeps it alive. ``sample`` returns when
    its work is done either way.

    Raises ``BadBundle`` for a damaged bundle, ``BadEngine`` for engines that don't fit this machine (naming each
    field that differs and the command that rebuilds them), ``Unavailable`` for a missing library or device.
    """
    if threads < 0:
        raise BadInput(f"threads = {threads}; allowed is 0 (all cores) or more", hint="e.g. --threads 4")
    check_mode(graph)
    started = perf_counter()
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle), verify=verify)
    place = open_device(device, stream=stream)
    name = backend or _default_backend(opened)
    library = open_backend(name)
    engines: dict[str, Engine] = {}
    try:
        for member in opened.manifest.members:
            engines[member] = _load_member(opened, member, library, place, threads)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return Runtime(opened, place, name, engines, 1e3 * (perf_counter() - started), graph=graph)


def _default_backend(bundle: Bundle) -> str:
    for member in bundle.manifest.members.values():
        for record in member.engines:
            return record.identity.backend
    raise BadEngine(f"the bundle {bundle.root} holds no engines", hint=f"build them: {bundle.rebuild_command}")


def _load_member(bundle: Bundle, name: str, backend: Backend, device: Device, threads: int) -> Engine:
    member = bundle.manifest.members[name]
    records = [record for record in member.engines if record.identity.backend == backend.name]
    if not records:
        have = sorted({record.identity.backend for record in member.engines})
        raise BadEngine(
            f"the bundle {bundle.root} has no {backend.name} engine of member {name!r}; "
            f"it has: {', '.join(have) or 'none'}",
            hint=f"build it: {bundle.rebuild_command} --backend {backend.name}",
        )
    arch = backend.arch(device.name)
    record = next((record for record in records if backend.here(record.identity, arch) == record.identity), records[0])
    check_identity(
        record.identity,
        _identity_here(record, model_digest(member.onnx), member.precision, backend, arch),
        what=f"the {backend.name} engine of member {name!r}",
        rebuild=f"{bundle.rebuild_command} --backend {backend.name} --device {device.name.partition(':')[0]}",
    )
    return backend.load(
        bundle.path(record.files[0]), member=member, identity=record.identity, device=device, threads=threads
    )


def _identity_here(
    record: EngineRecord, onnx_sha256: str, precision: Literal["fp32", "fp16", "bf16"], backend: Backend, arch: str
) -> EngineIdentity:
    """What the record's identity would be if it were made now: what the builder chose freely is kept."""
    return msgspec.structs.replace(
        backend.here(record.identity, arch), schema=SCHEMA, onnx_sha256=onnx_sha256, precision=precision
    )
