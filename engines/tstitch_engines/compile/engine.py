"""One member's engine: its identity first, then from the old bundle, from the cache, or compiled now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Final

import msgspec

from tstitch_engines.backends import Backend
from tstitch_engines.bundle.built_here import is_built_here, note_built
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.cache import Cache, Entry
from tstitch_engines.bundle.files import copy_component
from tstitch_engines.bundle.identity import digest, model_digest
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity, EngineRecord, Network, Option
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.progress import Progress
from tstitch_engines.spec import ShapeProfile

__all__ = ["Compiler", "from_cache", "keep_record"]

_log = logging.getLogger(__name__)

_COMPILE_SCHEMA: Final = 2  # of every engine's cache key and name: raise it when an identity is compiled otherwise


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A backend with all that decides what it makes, and the cache of what it made. ``settings`` are typed options.

    ``limits``: of the child process that compiles one network.
    """

    backend: Backend
    device: str
    profile: ShapeProfile
    settings: Mapping[str, Option]
    cache: Cache
    limits: Limits = DEFAULT
    arch: str = field(init=False)
    gpu: str | msgspec.UnsetType = field(init=False)

    def __post_init__(self) -> None:
        """Raises ``Unavailable`` or ``BadInput`` where the backend can't compile for ``device`` with ``settings``."""
        object.__setattr__(self, "arch", self.backend.build_arch(self.device, self.settings))
        object.__setattr__(self, "gpu", self.backend.build_gpu(self.device, self.settings))

    def identity(self, member: Network) -> EngineIdentity:
        return EngineIdentity(
            schema=SCHEMA,
            backend=self.backend.name,
            backend_version=self.backend.version(),
            onnx_sha256=model_digest(member.onnx),
            precision=member.precision,
            profile=self.profile,
            arch=self.arch,
            gpu=self.gpu,
            options={name: value for name, value in self.settings.items() if name not in self.backend.unrecorded},
        )

    def engines(
        self,
        name: str,
        member: Network,
        staging: Path,
        *,
        what: str,
        previous: Bundle | None,
        report: Progress,
        model: Callable[[], Path] | None = None,
    ) -> tuple[EngineRecord, ...]:
        """The engine of ``member`` for the bundle that is made at ``staging``; ``what`` names it in messages.

        The engines that ``previous``, the bundle that is replaced, has for other backends or machines stay beside it,
        in their order: the first engine is the default. ``model`` gives what the backend compiles, else the ONNX in
        ``staging``, and is called only when it has to. Raises what ``Backend.compile`` raises.
        """
        identity, what = self.identity(member), f"{what}: {self.backend.name} engine"
        key = digest({"schema": _COMPILE_SCHEMA, "identity": identity})
        output = f"{self.backend.name}-{key[:12]}{self.backend.engine_suffix}"
        networks = previous.manifest.networks() if previous is not None else {}
        old = networks[name].engines if name in networks else ()
        # What may run code is not taken over from a bundle of unknown origin.
        fitting = (
            record
            for record in old
            if record.identity == identity
            and record.files[0].path.rpartition("/")[2] == output  # else of another schema
            and not self.cache.fresh
            and (not self.backend.runs_code or is_built_here(record.files))
        )
        engine = next((record for record in fitting if keep_record(previous, record, staging)), None)
        if engine is None:
            engine = self._compiled(name, member, identity, key, output, staging, what, report, model)
        else:
            _log.info("%s: reused from the bundle", what)
        found: list[EngineRecord] = []
        for record in old:
            if self._replaces(record.identity):
                if engine not in found:
                    found.append(engine)
            elif record.identity.onnx_sha256 != model_digest(member.onnx):
                _log.warning("member %s: its %s engine is of another ONNX, dropped", name, record.identity.backend)
            elif {part.path for part in record.files} & {part.path for part in engine.files}:
                # no builder names two engines alike: this record was altered by hand
                _log.warning(
                    "member %s: its %s engine is in the new one's file, dropped", name, record.identity.backend
                )
            elif keep_record(previous, record, staging):
                found.append(record)
        return tuple(found if engine in found else [*found, engine])

    def _replaces(self, old: EngineIdentity) -> bool:
        """Whether it is of the same backend and for the same GPUs; an old one that names no model may be for this."""
        same = (old.backend, old.arch) == (self.backend.name, self.arch)
        return same and (msgspec.UNSET in (old.gpu, self.gpu) or old.gpu == self.gpu)

    def _compiled(
        self,
        name: str,
        member: Network,
        identity: EngineIdentity,
        key: str,
        output: str,
        staging: Path,
        what: str,
        report: Progress,
        model: Callable[[], Path] | None,
    ) -> EngineRecord:
        """From the cache, or compiled now."""
        backend = self.backend

        def make(folder: Path) -> dict[str, object]:
            source = staging / member.onnx[0].path if model is None else model()
            started = perf_counter()
            notes: dict[str, str] = {}
            written = backend.compile(
                member=member,
                model=source,
                profile=self.profile,
                device=self.device,
                options=self.settings,
                output=folder / output,
                progress=report,
                limits=self.limits,
                note=notes.__setitem__,
            )
            driver = backend.driver(self.device)
            return {
                "what": what,
                "files": [path.name for path in written],
                "backend": backend.name,
                "arch": self.arch,
                "onnx_sha256": identity.onnx_sha256,
                "onnx_bytes": sum(part.bytes for part in member.onnx),
                "seconds": perf_counter() - started,
                **({} if driver is msgspec.UNSET else {"driver": driver}),
                "notes": notes,
            }

        with from_cache(self.cache, key, make, what) as entry:
            files = tuple(
                copy_component(entry.files[file], staging, f"{name}/engines/{file}") for file in entry.info["files"]
            )
            notes = dict(entry.info["notes"])
        note_built(files)
        driver = entry.info.get("driver", msgspec.UNSET)
        return EngineRecord(files=files, identity=identity, driver=driver, notes=notes)


def keep_record(previous: Bundle | None, record: EngineRecord, staging: Path) -> bool:
    """Copies an engine of ``previous``; ``False``, and nothing copied, when its files are not as the manifest says."""
    assert previous is not None
    for part in record.files:
        try:
            whole = copy_component(previous.path(part), staging, part.path) == part
        except FileNotFoundError:
            whole = False
        if not whole:
            _log.warning("%s is missing or was altered, not reused", part.path)
            for written in record.files:
                (staging / written.path).unlink(missing_ok=True)
            return False
    return True


def from_cache(cache: Cache, key: str, make: Callable[[Path], dict[str, object]], what: str) -> Entry:
    """The entry of ``key``, made when it is not there; by one process, where several ask for it at once."""
    entry = cache.get(key)
    if entry is None:

        def waiting() -> None:
            _log.info("%s: waiting for another process that is building it", what)

        with cache.alone(key, waiting) as waited:
            if waited:
                entry = cache.get(key)
            if entry is None:
                _log.info("%s: building", what)
                return cache.put(key, make)
    _log.info("%s: reused from the cache", what)
    return entry
