"""Engines compiled from a bundle's own ONNX: for one more backend, or again. Needs neither checkpoints nor torch."""

from __future__ import annotations

import errno
import logging
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from tstitch_engines.backends import BACKENDS, Backend, open_backend
from tstitch_engines.bundle.bundle import MANIFEST, Bundle, write_bundle
from tstitch_engines.bundle.cache import Cache
from tstitch_engines.bundle.files import copy_component
from tstitch_engines.bundle.manifest import Component, EngineRecord, Manifest, Network, Option
from tstitch_engines.bundle.signature import SIGNATURE
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.compile.engine import Compiler, keep_record
from tstitch_engines.errors import BadBundle, BadInput, BuildFailed, unknown_name
from tstitch_engines.progress import Progress, silent
from tstitch_engines.spec import Range, ShapeProfile, usual_batch

__all__ = ["compile_command", "recompile"]

_log = logging.getLogger(__name__)


def compile_command(bundle: Bundle, backend: str, device: str = "cpu") -> str:
    """The command that compiles the engines of ``backend`` for ``device``."""
    if backend in BACKENDS and not BACKENDS[backend].from_onnx:
        return f"{bundle.rebuild_command} --backend {backend} --device {device}"
    words = ("tstitch-trt", "build", str(bundle.root), "--backend", backend, "--device", device.removesuffix(":0"))
    return shlex.join(words)


def recompile(
    bundle: Bundle,
    *,
    backend: str,
    device: str = "cpu",
    names: Iterable[str] | None = None,
    profile: Mapping[str, Range] | None = None,
    options: Mapping[str, Option] | None = None,
    changes: Mapping[str, Option] | None = None,
    output: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    limits: Limits = DEFAULT,
) -> Bundle:
    """``bundle`` with engines of ``backend`` for all its networks or for ``names``; all else is kept.

    ``options`` and ``profile`` default to those of the engine it has of that backend, the profile else to those of
    other engines; a range of ``B`` is for members only. ``changes``: single options, given on top of ``options``. An
    engine of the same backend and architecture is replaced. What was compiled before comes from the bundle or the
    cache, unless ``fresh``; an interrupted call goes on there. ``limits``: of the child process that compiles one
    network.

    It replaces ``bundle`` in one step at the end, or is written to ``output``. Raises ``BadBundle`` when the ONNX is
    not what the manifest describes or the place is read-only, ``BadInput`` before any work, ``BuildFailed``,
    ``OutOfTime`` and ``OutOfMemory``.
    """
    opened = open_backend(backend)
    if opened.model_kind != "onnx":
        raise BadInput(
            f"the backend {backend!r} is not compiled from ONNX, and a bundle holds nothing else to compile from",
            hint=f"build it from its recipe: {compile_command(bundle, backend, device)}",
        )
    networks = bundle.manifest.networks()
    wanted = list(networks if names is None else dict.fromkeys(names))
    for name in wanted:
        if name not in networks:
            raise unknown_name("member", name, networks)
    for dim in profile or ():
        if not any(dim in networks[name].dims for name in wanted):
            raise BadInput(
                f"the dimension {dim} has one fixed size in the bundle's ONNX",
                hint=f"leave out its range, or build from the recipe: {bundle.rebuild_command}",
            )
    bundle.check_files(part for name in wanted for part in networks[name].onnx)
    cache = Cache(fresh=fresh)
    compilers: dict[str, Compiler] = {}
    for name in wanted:
        ranges = {dim: r for dim, r in (profile or {}).items() if dim != "B" or name in bundle.manifest.members}
        batch = usual_batch(guided=bundle.manifest.usually_guided(name))
        compilers[name] = _compiler(
            opened, networks[name], device, ranges, options, changes or {}, cache, limits, batch
        )
    place = bundle.root.resolve() if output is None else output.resolve()
    _require_writable(place, compile_command(bundle, backend, device))
    in_place = place == bundle.root.resolve()
    if in_place and (place / SIGNATURE).exists():
        _log.warning("%s was signed; with engines compiled again it is not: sign it anew with tstitch-trt sign", place)
    made = write_bundle(place, _Work(bundle, compilers, in_place=in_place, report=progress or silent).fill)
    made.vouched = bundle.vouched  # what was kept is what was signed, the rest was compiled here
    return made


def _compiler(
    backend: Backend,
    network: Network,
    device: str,
    profile: Mapping[str, Range],
    options: Mapping[str, Option] | None,
    changes: Mapping[str, Option],
    cache: Cache,
    limits: Limits,
    batch: Range,
) -> Compiler:
    """``batch``: where neither ``profile`` nor an engine of the network tells it."""
    same = [record.identity for record in network.engines if record.identity.backend == backend.name]
    every = [*same, *(record.identity for record in network.engines)]
    dims: dict[str, Range] = {}
    for name in network.dims:
        known = next((one.profile.dims[name] for one in every if name in one.profile.dims), None)
        found = profile.get(name, known or (batch if name == "B" else None))
        if found is None:
            raise BadInput(
                f"no range of the dimension {name} is given, and the bundle has no engine that tells",
                hint="compile it for a fixed size: give its range as MIN:OPT:MAX, or build from the recipe",
            )
        dims[name] = found
    if options is None:
        # A manifest names no file that is written to (timing-cache).
        recorded = (
            {key: value for key, value in same[0].options.items() if key not in backend.unrecorded} if same else {}
        )
        options = backend.options_for(recorded, device)
    return Compiler(
        backend=backend,
        device=device,
        profile=ShapeProfile(dims),
        settings={**options, **changes},
        cache=cache,
        limits=limits,
    )


def _require_writable(place: Path, command: str) -> None:
    """Both the folder that is replaced and the one it lies in: who made it read-only wants it to stay as it is."""
    for folder in (place, next(parent for parent in place.parents if parent.exists())):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise BadBundle(
                f"{place} can't be replaced: {folder} is read-only ({os.strerror(errno.EACCES)})",
                hint=f"compile into another one: {command} -o DIR",
            )


class _Work:
    def __init__(self, bundle: Bundle, compilers: Mapping[str, Compiler], *, in_place: bool, report: Progress) -> None:
        self._bundle = bundle
        self._compilers = compilers
        self._in_place = in_place
        self._report = report
        self._manifest_bytes = bundle.content or (bundle.root / MANIFEST).read_bytes()

    def fill(self, staging: Path) -> Manifest:
        manifest = self._bundle.manifest
        made = manifest.engine_paths()
        for part in manifest.components():
            if part.path not in made:
                self._keep(part, staging)
        records: dict[str, tuple[EngineRecord, ...]] = {}
        for name, network in manifest.networks().items():
            if name in self._compilers:
                records[name] = self._compile(name, network, staging)
            else:
                kept = [record for record in network.engines if keep_record(self._bundle, record, staging)]
                records[name] = tuple(kept)
        if self._in_place and (self._bundle.root / MANIFEST).read_bytes() != self._manifest_bytes:
            raise BuildFailed(
                f"{self._bundle.root} was changed by another process meanwhile",
                hint="run this again: what was compiled is in the cache",
            )
        self._report("done", 1.0)
        versions = dict(manifest.versions)
        for compiler in self._compilers.values():
            versions[compiler.backend.name] = compiler.backend.version()
        return msgspec.structs.replace(
            manifest,
            versions=versions,
            members={n: msgspec.structs.replace(m, engines=records[n]) for n, m in manifest.members.items()},
            parts={n: msgspec.structs.replace(p, engines=records[n]) for n, p in manifest.parts.items()},
        )

    def _compile(self, name: str, network: Network, staging: Path) -> tuple[EngineRecord, ...]:
        compiler, index, count = self._compilers[name], list(self._compilers).index(name), len(self._compilers)
        return compiler.engines(
            name,
            network,
            staging,
            what=f"{self._bundle.manifest.word(name)} {name}",
            previous=self._bundle,
            report=lambda phase, share: self._report(f"{name}: {phase}", (index + share) / count),
        )

    def _keep(self, part: Component, staging: Path) -> None:
        """Linked where the old bundle goes away (weights are large), copied where it stays."""
        source, target = self._bundle.path(part), staging / part.path
        if self._in_place:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:  # a file system without links
                target.unlink(missing_ok=True)
            else:
                return
        if copy_component(source, staging, part.path) != part:
            raise BadBundle(
                f"{source} was altered while it was copied", hint=f"build it again: {self._bundle.rebuild_command}"
            )
