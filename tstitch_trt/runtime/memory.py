"""The device memory of a runtime, as far as the manifest tells it."""

from __future__ import annotations

from tstitch_engines.bundle.manifest import ComponentName, Manifest
from tstitch_engines.device.slab import slab_bytes
from tstitch_engines.spec import ShapeProfile
from tstitch_trt.request.limits import Limits
from tstitch_trt.runtime.arena import arena_bytes
from tstitch_trt.runtime.io_buffers import conditioning_rows, io_buffer_sizes

__all__ = ["planned_limits", "planned_memory"]


def planned_limits(manifest: Manifest) -> dict[str, Limits]:
    """By backend the sizes that a runtime will allow, for backends that all members have engines of."""
    planned: dict[str, Limits] = {}
    for backend in dict.fromkeys(r.identity.backend for m in manifest.members.values() for r in m.engines):
        profiles = _profiles(manifest, backend)
        if manifest.members.keys() <= profiles.keys():
            planned[backend] = Limits.of(manifest, profiles)
    return planned


def planned_memory(manifest: Manifest) -> dict[str, dict[str, int]]:
    """By backend: the bytes of ``arena`` and ``engine io``, as ``Runtime.memory`` names them.

    Only for backends that all members have engines of. Weights and activations are known once the engines are loaded.
    """
    found = {}
    for backend, limits in planned_limits(manifest).items():
        height, width = limits.largest
        elements, rows = manifest.latent.channels * height * width, conditioning_rows(manifest, limits)
        found[backend] = {
            "arena": arena_bytes(limits.batch.max, elements, manifest.noise.steps, rows),
            "engine io": slab_bytes(io_buffer_sizes(manifest, limits)),
        }
    return found


def _profiles(manifest: Manifest, backend: str) -> dict[str, ShapeProfile]:
    """The profile with the largest batch of each network that a step runs and that has engines of ``backend``."""
    found: dict[str, ShapeProfile] = {}
    for name in (*manifest.members, *({ComponentName.CONTROLNET} & set(manifest.parts))):
        records = (r.identity.profile for r in manifest.networks()[name].engines if r.identity.backend == backend)
        if (largest := max(records, key=lambda profile: profile.dims["B"].max, default=None)) is not None:
            found[name] = largest
    return found
