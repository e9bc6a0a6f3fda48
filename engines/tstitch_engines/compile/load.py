"""Loading engines. ``Backend.load`` is called here and nowhere else, after the question whether to trust the engine.

Loading an engine of some backends may run code that is in it (``Backend.runs_code``). Such an engine loads when the
caller named the backend or trusts the bundle, when this machine compiled it, or when the bundle has a signature that
the caller required. Otherwise a file from a stranger would decide what runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tstitch_engines.bundle.built_here import is_built_here
from tstitch_engines.bundle.manifest import siblings
from tstitch_engines.errors import Untrusted

if TYPE_CHECKING:
    from tstitch_engines.backends import Backend, Engine
    from tstitch_engines.bundle.bundle import Bundle
    from tstitch_engines.bundle.manifest import EngineIdentity, EngineRecord, Network
    from tstitch_engines.device.base import Device

__all__ = ["load_engine", "load_own", "require_trust"]

_log = logging.getLogger(__name__)


def load_engine(
    bundle: Bundle,
    name: str,
    record: EngineRecord,
    backend: Backend,
    device: Device,
    *,
    threads: int,
    trusted: bool,
) -> Engine:
    """An engine of the network ``name``. Raises what ``require_trust`` and ``Backend.load`` raise."""
    require_trust(bundle, name, record, backend, trusted=trusted)
    driver = backend.driver(device.name)
    if msgspec.UNSET not in (driver, record.driver) and _older(str(driver), str(record.driver)):
        _log.warning(
            "the %s engine of %s %r was compiled with the driver %s, and this machine has %s, which is older: update "
            "the driver if the engine fails",
            backend.name,
            bundle.manifest.word(name),
            name,
            record.driver,
            driver,
        )
    return backend.load(
        bundle.path(record.files[0]),
        beside=siblings(record.files),
        member=bundle.manifest.networks()[name],
        identity=record.identity,
        device=device,
        threads=threads,
    )


def _older(driver: str, other: str) -> bool:
    """Of drivers as ``Backend.driver`` has them, by the numbers that both have."""
    ours, theirs = ([int(part) for part in re.findall(r"\d+", text)] for text in (driver, other))
    return ours < theirs[: len(ours)]


def require_trust(bundle: Bundle, name: str, record: EngineRecord, backend: Backend, *, trusted: bool) -> None:
    """Raises ``Untrusted`` for an engine that may run code when it is loaded and that nobody vouches for.

    ``trusted``: the caller named the backend, or trusts the bundle.
    """
    if trusted or not backend.runs_code:
        return
    if bundle.vouched or is_built_here(record.files):
        if not bundle.hashed:  # both are about what the manifest says that the files are
            bundle.check_files(record.files)
        return
    again = "; or --rebuild, which compiles it again from the bundle's ONNX" if backend.model_kind == "onnx" else ""
    raise Untrusted(
        f"the {backend.name} engine of {bundle.manifest.word(name)} {name!r} in {bundle.root} was not compiled on this "
        f"machine, and loading it may run code: {backend.runs_code}",
        hint=f"if you trust who made the bundle: --backend {backend.name} or --trust (trust=True), or "
        f"--require-signature KEY where it is signed{again}; else use an engine of onnxruntime, which is data",
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
