"""Loading engines. ``Backend.load`` is called here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tstitch_engines.bundle.manifest import siblings

if TYPE_CHECKING:
    from tstitch_engines.backends import Backend, Engine
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_engines.bundle.manifest import EngineIdentity, EngineRecord, Network
    from tstitch_engines.device.base import Device

__all__ = ["load_engine", "load_own"]


def load_engine(
    bundle: Bundle, name: str, record: EngineRecord, backend: Backend, device: Device, *, threads: int
) -> Engine:
    """An engine of the network ``name`` of a bundle. Raises what ``Backend.load`` raises."""
    return backend.load(
        bundle.path(record.files[0]),
        beside=siblings(record.files),
        member=bundle.manifest.networks()[name],
        identity=record.identity,
        device=device,
        threads=threads,
    )


def load_own(
    backend: Backend,
    files: Sequence[Path],
    member: Network,
    identity: EngineIdentity,
    device: Device,
    *,
    threads: int,
) -> Engine:
    """An engine that this process compiled from a checked graph, or such a graph itself. ``files[0]`` is loaded."""
    beside = [path.name for path in files[1:]]
    return backend.load(files[0], beside=beside, member=member, identity=identity, device=device, threads=threads)
