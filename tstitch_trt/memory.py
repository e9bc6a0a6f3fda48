"""What a runtime will hold in device memory, as far as the manifest alone tells."""

from __future__ import annotations

from tstitch_engines.manifest import Manifest
from tstitch_engines.slab import slab_bytes
from tstitch_trt.lanes import arena_bytes
from tstitch_trt.stepper import io_slices

__all__ = ["planned_memory"]


def planned_memory(manifest: Manifest) -> dict[str, dict[str, int]]:
    """By backend: the bytes of ``arena`` and ``engine io``, as ``Runtime.memory`` names them.

    Only for backends that all members have engines of. Weights and activations are known once the engines are loaded.
    """
    latent = manifest.latent
    limits: dict[str, list[int]] = {}
    for member in manifest.members.values():
        for backend in dict.fromkeys(record.identity.backend for record in member.engines):
            batches = [r.identity.profile.dims["B"].max for r in member.engines if r.identity.backend == backend]
            limits.setdefault(backend, []).append(max(batches))
    return {
        backend: {
            "arena": arena_bytes(min(batches), latent.channels * latent.height * latent.width, manifest.noise.steps),
            "engine io": slab_bytes(io_slices(manifest, min(batches))),
        }
        for backend, batches in limits.items()
        if len(batches) == len(manifest.members)
    }
