"""Which engine of a bundle fits this machine, and compiling again those that don't."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from tstitch_engines.bundle.identity import check_identity, differences, model_digest
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity, EngineRecord, Network
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.compile.bundle import compile_command, recompile
from tstitch_engines.compile.load import require_trust
from tstitch_engines.errors import BadBundle, BadEngine, BadInput
from tstitch_engines.progress import Progress

if TYPE_CHECKING:
    from tstitch_engines.backends import Backend
    from tstitch_engines.bundle.bundle import Bundle

__all__ = ["check_load_options", "default_backend", "rebuild", "select_engine"]

_log = logging.getLogger(__name__)


def default_backend(bundle: Bundle) -> str:
    """The backend that the bundle was built for first. Raises ``BadEngine`` for a bundle without engines."""
    for member in bundle.manifest.members.values():
        for record in member.engines:
            return record.identity.backend
    raise BadEngine(
        f"the bundle {bundle.root} holds no engines", hint=f"compile them: {compile_command(bundle, 'onnxruntime')}"
    )


def select_engine(bundle: Bundle, name: str, backend: Backend, device: str) -> EngineRecord:
    """The engine of the member or part ``name`` that runs on ``device``.

    Raises ``BadEngine`` naming each field in which the bundle's engine differs, and the command that compiles it again.
    """
    network = bundle.manifest.networks()[name]
    records = [record for record in network.engines if record.identity.backend == backend.name]
    command = compile_command(bundle, backend.name, device)
    if not records:
        have = sorted({record.identity.backend for record in network.engines})
        raise BadEngine(
            f"the bundle {bundle.root} has no {backend.name} engine of {bundle.manifest.word(name)} {name!r}; "
            f"it has: {', '.join(have) or 'none'}",
            hint=f"compile it: {command}; or add --rebuild",
        )
    arch = backend.arch(device)

    def distance(record: EngineRecord) -> tuple[int, bool, bool]:
        """None of those that fit; then one that was compiled for this very GPU before one that runs on others too."""
        differing = differences(record.identity, _here(record, network, backend, device))
        return len(differing), record.identity.arch != arch, record.identity.gpu is msgspec.UNSET

    record = min(records, key=distance)
    check_identity(
        record.identity,
        _here(record, network, backend, device),
        what=f"the {backend.name} engine of {bundle.manifest.word(name)} {name!r}",
        rebuild=f"{command}; or add --rebuild",
    )
    backend.check_file(bundle.path(record.files[0]), device)
    return record


def rebuild(
    bundle: Bundle,
    backend: Backend,
    device: str,
    *,
    names: Iterable[str],
    trusted: bool,
    verify: Literal["full", "size"] = "full",
    progress: Progress | None = None,
    limits: Limits = DEFAULT,
) -> Bundle:
    """``bundle`` with engines that fit ``device``.

    Compiled again are those that are missing, damaged, don't fit, or may run code and are not ``trusted``
    (``compile.load``).

    From the bundle's own ONNX, with the recorded options and profile; see ``recompile``. The bundle itself comes back
    when nothing is to be done.
    """
    stale: list[str] = []
    for name in names:
        try:
            record = select_engine(bundle, name, backend, device)
            bundle.check_files(record.files, full=verify == "full")
            if backend.model_kind == "onnx":
                require_trust(bundle, name, record, backend, trusted=trusted)
        except (BadEngine, BadBundle) as error:
            _log.info("compiling again: %s", error.message)
            stale.append(name)
    if not stale:
        return bundle
    return recompile(bundle, backend=backend.name, device=device, names=stale, progress=progress, limits=limits)


def check_load_options(
    bundle: Bundle, name: str, record: EngineRecord, backend: Backend, device: str, given: Mapping[str, object]
) -> None:
    """Raises ``BadInput`` for an option of ``load`` that was ``given`` and that this engine can't honour."""
    for option, reason in backend.refused(record.identity, device).items():
        if given.get(option) is not None:
            raise BadInput(
                f"{option} = {given[option]} can't be honoured by the {backend.name} engine of "
                f"{bundle.manifest.word(name)} {name!r}: {reason}",
                hint=f"leave out --{option} ({option}=...), or use an engine of another backend: --backend onnxruntime",
            )


def _here(record: EngineRecord, network: Network, backend: Backend, device: str) -> EngineIdentity:
    """What the record's identity would be if it were made now: what the builder chose freely is kept."""
    return msgspec.structs.replace(
        backend.current_identity(record.identity, device),
        schema=SCHEMA,
        onnx_sha256=model_digest(network.onnx),
        precision=network.precision,
    )
