"""A bundle with another member in place of one of its own: its files, and an engine of the new member."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.cache import Cache
from tstitch_engines.bundle.files import copy_component
from tstitch_engines.bundle.manifest import EngineRecord, Manifest, Member
from tstitch_engines.compile.engine import Compiler
from tstitch_engines.errors import BadBundle
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range, ShapeProfile, usual_batch
from tstitch_engines.version import VERSION
from tstitch_trt.reference.recorder import needs_widening

__all__ = ["assemble"]

_log = logging.getLogger(__name__)


def assemble(bundle: Bundle, staging: Path, name: str, member: Member) -> Manifest:
    """Every other file as it was, and an ONNX Runtime engine of the quantised member."""
    from tstitch_export.build import versions_of

    old = bundle.manifest
    replaced = old.members[name]
    others = {**old.members, name: msgspec.structs.replace(replaced, onnx=(), engines=(), files=member.files)}
    for part in msgspec.structs.replace(old, members=others).components():
        if copy_component(bundle.path(part), staging, part.path) != part:
            raise BadBundle(
                f"{bundle.path(part)} was altered meanwhile", hint=f"build it again: {bundle.rebuild_command}"
            )
    backend = open_backend("onnxruntime")
    records: tuple[EngineRecord, ...] = ()
    if not needs_widening(member):
        engines = [e for e in replaced.engines if e.identity.backend == backend.name] or [*replaced.engines]
        profile = engines[0].identity.profile if engines else _profile(old, name, member)
        compiler = Compiler(backend=backend, device="cpu", profile=profile, settings={}, cache=Cache())
        records = compiler.engines(name, member, staging, what=f"member {name}", previous=None, report=silent)
    else:
        _log.warning("member %s has bfloat16 layers, so no ONNX Runtime engine: the CPU has no kernels", name)
    have = {record.identity.backend for record in records}
    for other in dict.fromkeys(e.identity.backend for e in replaced.engines):
        if other not in have:
            _log.warning("member %s has no %s engine yet: tstitch-trt build BUNDLE --backend %s", name, other, other)
    members = {**old.members, name: msgspec.structs.replace(member, engines=records)}
    made = {"tstitch-trt": VERSION, backend.name: backend.version()} | versions_of(("nvidia-modelopt",))
    versions = old.versions | made
    return msgspec.structs.replace(old, members=members, versions=versions)


def _profile(manifest: Manifest, name: str, member: Member) -> ShapeProfile:
    """Of the engine of a member that had none: as another member's, else of the bundle's own size."""
    known = {dim: r for m in manifest.members.values() for e in m.engines for dim, r in e.identity.profile.dims.items()}
    batch = usual_batch(guided=manifest.usually_guided(name))
    own = {"H": manifest.latent.height, "W": manifest.latent.width, "T": 77}
    return member.profile_of({"B": batch, **{dim: Range(size, size, size) for dim, size in own.items()}, **known})
