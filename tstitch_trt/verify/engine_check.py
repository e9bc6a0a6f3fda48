"""One engine under test: checks its identity and loads it where it can run here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import msgspec

from tstitch_engines.backends import describe_file, for_gpu, open_backend
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.identity import check_identity, digest, model_digest
from tstitch_engines.bundle.manifest import SCHEMA, EngineRecord
from tstitch_engines.compile.bundle import compile_command
from tstitch_engines.compile.load import load_engine
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadEngine, FailedWork, Unavailable, Untrusted
from tstitch_engines.host_call import HostRunner
from tstitch_trt.verify.compare import LIMITS, Comparison, EngineCheck, Status, compare, draw_inputs, verdict
from tstitch_trt.verify.plan_layers import LayerList, has_layers, list_layers
from tstitch_trt.verify.references import References

__all__ = ["check_engine"]


def check_engine(
    bundle: Bundle,
    name: str,
    record: EngineRecord,
    references: Callable[[], References],
    *,
    gpu: str,
    threads: int,
    trusted: bool,
    layers: bool = False,
    tick: Callable[[str], None],
) -> EngineCheck:
    """Checks one engine of the network ``name``, and compares it with its references where it can run here.

    ``references``: opened by the first call. ``gpu``: where engines for GPUs run; ``cpu`` leaves them out. ``trusted``:
    see ``compile.load``. ``layers``: also list those of a TensorRT engine, as it tells them itself where it is loaded.
    """
    identity, network = record.identity, bundle.manifest.networks()[name]
    limit, why = LIMITS[network.precision]
    place = gpu if for_gpu(identity.backend, identity.arch) else "cpu"
    again = compile_command(bundle, identity.backend, place)
    path = bundle.path(record.files[0])
    plan: str | None = None
    listed: LayerList | str | None = None

    def result(status: Status, reason: str | None, comparisons: tuple[Comparison, ...] = ()) -> EngineCheck:
        return EngineCheck(
            member=name,
            kind="member" if name in bundle.manifest.members else "part",
            backend=identity.backend,
            backend_version=identity.backend_version,
            arch=identity.arch,
            precision=identity.precision,
            identity=digest(identity),
            status=status,
            reason=reason,
            plan=plan,
            limit=limit,
            limit_reason=why,
            comparisons=comparisons,
            layers=listed,
        )

    try:
        want = msgspec.structs.replace(
            identity, schema=SCHEMA, onnx_sha256=model_digest(network.onnx), precision=network.precision
        )
        check_identity(identity, want, what=f"the {identity.backend} engine", rebuild=again)
        plan = describe_file(identity, path, again)
        if layers and has_layers(record):
            listed = list_layers(bundle, record)
        runner = _load(bundle, name, record, place, threads, again, trusted=trusted)
    except Unavailable as error:
        return result("not checked", error.message)
    except Untrusted as error:
        return result("not checked", f"{error.message}; {error.hint}")
    except BadEngine as error:
        return result("failed", error.message)
    with closing(runner):
        if layers and has_layers(record):
            listed = list_layers(bundle, record, runner.engine)
        against = references()
        tick(f"recording a trajectory for {name}")
        drawn = draw_inputs(against, bundle.manifest, name, runner.engine.profile)
        try:
            comparisons = compare(
                name, runner, against, drawn, limit=limit, tick=lambda: tick(f"{name}, {identity.backend}")
            )
        except FailedWork as error:
            return result("failed", f"running it failed: {error.message}")
    status, reason = verdict(comparisons, limit)
    if status == "failed" and (doubt := open_backend(identity.backend).doubt(identity)):
        reason = f"{reason}; {doubt}"
    return result(status, reason, comparisons)


def _load(
    bundle: Bundle, name: str, record: EngineRecord, place: str, threads: int, again: str, *, trusted: bool
) -> HostRunner:
    """Raises ``Unavailable`` for an engine that can't run here, ``Untrusted`` for one that is not to."""
    identity = record.identity
    backend = open_backend(identity.backend)
    if place == "cpu" and for_gpu(identity.backend, identity.arch):
        raise Unavailable(f"it is for GPUs ({identity.arch}), and the device asked for is cpu", hint="ask for cuda")
    device = open_device(place)
    try:
        check_identity(identity, backend.current_identity(identity, device.name), what="it", rebuild=again)
        backend.check_file(bundle.path(record.files[0]), device.name)
    except BadEngine as error:  # a sound engine for another machine or version
        raise Unavailable(error.message, hint=error.hint) from None
    return HostRunner(load_engine(bundle, name, record, backend, device, threads=threads, trusted=trusted), device)
