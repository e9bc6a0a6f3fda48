"""The memory that a runtime takes, as far as the manifest tells it, compared with what is free before it is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from tstitch_engines.bundle.manifest import ComponentName, EngineRecord, Manifest
from tstitch_engines.child import free_memory, show_size
from tstitch_engines.device.base import Device
from tstitch_engines.device.slab import slab_bytes
from tstitch_engines.errors import OutOfMemory
from tstitch_engines.spec import ShapeProfile
from tstitch_trt.request.limits import Limits
from tstitch_trt.runtime.arena import arena_bytes
from tstitch_trt.runtime.io_buffers import conditioning_rows, io_buffer_sizes

__all__ = ["check_memory", "larger_than_free", "needed_memory", "planned_limits", "planned_memory"]

_log = logging.getLogger(__name__)


def planned_limits(manifest: Manifest) -> dict[str, Limits]:
    """By backend the sizes that a runtime will allow, for backends that all members have engines of."""
    return {backend: _limits(manifest, _profiles(records)) for backend, records in _planned(manifest).items()}


def planned_memory(manifest: Manifest) -> dict[str, dict[str, int]]:
    """By backend what ``needed_memory`` says of its engines with the largest batch, where all members have engines."""
    return {backend: needed_memory(manifest, records) for backend, records in _planned(manifest).items()}


def needed_memory(manifest: Manifest, records: Mapping[str, EngineRecord]) -> dict[str, int]:
    """Bytes that a runtime with these engines takes: ``weights`` (the engines' files), then as ``Runtime.memory``.

    ``arena`` and ``engine io`` are for the largest batch and size of its members, ``parts io`` for those of the parts.
    Activations are known once the engines are loaded.
    """
    profiles = _profiles(records)
    limits = _limits(manifest, profiles)
    height, width = limits.largest
    elements, rows = manifest.latent.channels * height * width, conditioning_rows(manifest, limits)
    found = {
        "weights": sum(part.bytes for record in records.values() for part in record.files),
        "arena": arena_bytes(limits.batch.max, elements, manifest.noise.steps, rows),
        "engine io": slab_bytes(io_buffer_sizes(manifest, limits)),
    }
    parts = {name: part for name, part in manifest.parts.items() if name in records and name not in _stepped(manifest)}
    if not parts:
        return found
    sizes = {
        (name, spec.name): spec.nbytes({dim: allowed.max for dim, allowed in profiles[name].dims.items()})
        for name, part in parts.items()
        for spec in (*part.inputs, *part.outputs)
    }
    return {**found, "parts io": sum(sizes.values())}


def check_memory(
    manifest: Manifest, records: Mapping[str, EngineRecord], device: Device, max_memory: int | None = None
) -> None:
    """Raises ``OutOfMemory`` where a runtime with these engines needs more than is free on ``device``.

    With ``max_memory`` all that it may come to is compared with that. Else what it takes at once is compared with what
    is free: weights and arena, on a GPU the engines' inputs and outputs too. On the CPU those are touched as far as
    requests are large, and so are those of text encoders and VAE anywhere.
    """
    needed = needed_memory(manifest, records)
    free, on_gpu = getattr(device, "free_memory", free_memory)(), device.name != "cpu"
    now = ("weights", "arena", "engine io") if on_gpu else ("weights", "arena")
    counted = needed if max_memory is not None else {name: needed[name] for name in now}
    allowed = free if max_memory is None else max_memory
    said = ", ".join(f"{name} {show_size(size)}" for name, size in counted.items())
    if allowed is not None and sum(counted.values()) > allowed:
        most = {dim: max(r.identity.profile.dims[dim].max for r in records.values() if dim in r.identity.profile.dims)
                for dim in sorted({dim for r in records.values() for dim in r.identity.profile.dims})}  # fmt: skip
        limit = f"{show_size(allowed)} are free" if max_memory is None else f"max_memory is {show_size(allowed)}"
        sizes = ", ".join(f"{dim} {size}" for dim, size in most.items())
        raise OutOfMemory(
            f"{manifest.name!r} needs {show_size(sum(counted.values()))} on {device.name} ({said}; its engines are for "
            f"sizes up to {sizes}), and {limit}",
            hint="build its engines for smaller batches and sizes: tstitch-trt build BUNDLE --batch 1:1:2; or allow "
            "more: --max-memory SIZE (max_memory=)",
        )
    if free is not None and sum(needed.values()) > free:
        _log.info("%s may come to %s at its largest batch and size", manifest.name, show_size(sum(needed.values())))


def larger_than_free(manifest: Manifest, backend: str) -> str | None:
    """Why a runtime with the engines of ``backend`` can't be loaded on the CPU with what is free now, in words."""
    needed, free = planned_memory(manifest).get(backend, {}), free_memory()
    now = sum(needed.get(name, 0) for name in ("weights", "arena"))
    if free is None or now <= free:
        return None
    weights, lanes = (show_size(needed[name]) for name in ("weights", "arena"))
    return (
        f"loading it takes {show_size(now)} at once (weights {weights}, lanes of its largest batch {lanes}), and "
        f"{show_size(free)} are free here: a smaller --batch needs less"
    )


def _planned(manifest: Manifest) -> dict[str, dict[str, EngineRecord]]:
    """By backend the engine with the largest batch of each network, for backends that all members have engines of."""
    found: dict[str, dict[str, EngineRecord]] = {}
    for backend in dict.fromkeys(r.identity.backend for m in manifest.members.values() for r in m.engines):
        records: dict[str, EngineRecord] = {}
        for name, network in manifest.networks().items():
            own = [record for record in network.engines if record.identity.backend == backend]
            if own:
                records[name] = max(own, key=lambda record: record.identity.profile.dims["B"].max)
        if manifest.members.keys() <= records.keys():
            found[backend] = records
    return found


def _profiles(records: Mapping[str, EngineRecord]) -> dict[str, ShapeProfile]:
    return {name: record.identity.profile for name, record in records.items()}


def _stepped(manifest: Manifest) -> set[str]:
    """The networks that a step runs."""
    return {*manifest.members, *({ComponentName.CONTROLNET} & set(manifest.parts))}


def _limits(manifest: Manifest, profiles: Mapping[str, ShapeProfile]) -> Limits:
    return Limits.of(manifest, {name: profile for name, profile in profiles.items() if name in _stepped(manifest)})
