"""Builds a bundle: recipe -> checkpoints -> ONNX -> engines -> one directory, reusing every unchanged component."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.backends import Progress, open_backend
from tstitch_engines.bundle import Bundle, is_bundle, open_bundle, write_bundle
from tstitch_engines.cache import Cache
from tstitch_engines.compiling import Compiler, from_cache
from tstitch_engines.errors import BadBundle, BadCheckpoint, BadInput, unknown_name
from tstitch_engines.files import copy_component, hash_file
from tstitch_engines.identity import digest
from tstitch_engines.manifest import (
    SCHEMA,
    Component,
    ExportCheck,
    Manifest,
    Member,
    Precision,
    Quality,
    Source,
)
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.compatibility import check_members
from tstitch_export.families import Family, Inspection, open_family
from tstitch_export.families.base import TORCH_NAMES, Scalar
from tstitch_export.options import split_options, typed
from tstitch_export.recipe import MemberRecipe, Recipe, check_member_name, load_recipe
from tstitch_export.shipped import ShippedMember, read_shipped

__all__ = ["build", "versions_of"]

_log = logging.getLogger(__name__)

_EXPORT_SCHEMA: Final = 1  # part of every export's cache key: raise it when exporter or graph work changes
_DEFAULT_PROFILE: Final = Range(1, 8, 16)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One member, everything about it decided and checked before any long work starts."""

    name: str
    recipe: MemberRecipe
    family: Family
    inspection: Inspection
    precision: Precision
    sources: tuple[Source, ...]
    shipped: ShippedMember | None
    folder: Path  # where a shipped member's files are


def build(
    recipe: str | Path,
    *,
    members: Mapping[str, Path] | None = None,
    output: Path,
    backend: str = "onnxruntime",
    precision: Precision | Mapping[str, Precision] = "fp32",
    profile: Range = _DEFAULT_PROFILE,
    device: str = "cpu",
    options: Mapping[str, Scalar] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Builds the bundle ``output`` and returns its manifest.

    ``members`` gives checkpoints by member name, in place of or in addition to the recipe's own. ``precision`` is one
    for all or one by member (fp32 where none is given). ``profile`` is the batch range of the engines; with guidance
    one image takes two places. ``options`` holds the backend's options, and ``MEMBER.NAME`` for a member's family.

    What did not change is reused: exports and engines come from the cache or from the bundle that is replaced, and
    engines that bundle has for other backends or machines are kept where the ONNX is the same. An interrupted build
    goes on from the cache. ``output`` is replaced in one step at the end or not at all.

    Raises ``BadInput`` and its kinds before anything is built, ``BuildFailed`` when an export or a compilation fails
    or the disk is full, ``Unavailable`` when a library is missing.
    """
    report = progress or (lambda phase, share: None)
    spec, base = load_recipe(recipe)
    opened = open_backend(backend)
    given = dict(members or {})
    for name in given:
        check_member_name(name)
    names = [*spec.members, *(name for name in given if name not in spec.members)]
    common, own = split_options(options or {}, names)
    settings = typed(common, opened.options, what=f"backend {backend!r}")
    compiler = Compiler.of(
        opened, device=device, profile=ShapeProfile({"B": profile}), settings=settings, cache=Cache()
    )
    plans = [
        _plan(name, spec, base, given.get(name), own[name], _precision_of(name, names, precision)) for name in names
    ]
    check_members(spec, {plan.name: (plan.recipe, plan.inspection) for plan in plans})
    builder = _Builder(compiler=compiler, previous=_previous(output), report=report)
    return write_bundle(
        output, lambda staging: builder.fill(staging, plans, spec, base, Path(str(recipe)).name)
    ).manifest


def _plan(
    name: str, spec: Recipe, base: Path, given: Path | None, options: Mapping[str, Scalar], precision: Precision
) -> _Plan:
    part = spec.members.get(name) or spec.other_members
    if part is None:
        raise unknown_name(f"member of recipe {spec.name!r}", name, spec.members)
    family = open_family(part.family)
    if given is None and part.checkpoint is None:
        raise BadInput(
            f"recipe {spec.name!r} has no checkpoint of its own for member {name!r}",
            hint=f"give it: --member {name}=CHECKPOINT (.safetensors, .pt, .pth or a diffusers folder)",
        )
    path = Path(given) if given is not None else base / str(part.checkpoint)
    # The recipe's options describe its own checkpoint; another file speaks for itself unless it can't.
    own = {**part.options, **options} if given is None else dict(options)
    try:
        try:
            inspection = family.inspect(path, typed(own, family.options, what=f"member {name!r}"))
        except BadCheckpoint:
            if given is None or not part.options or options:
                raise
            inspection = family.inspect(path, part.options)
        files = tuple(
            Source(
                name=path.name if len(inspection.files) == 1 else f"{path.name}/{file.name}",
                sha256=found[0],
                bytes=found[1],
                shipped=given is None,
            )
            for file, found in ((file, hash_file(file)) for file in inspection.files)
        )
    except OSError as error:
        raise BadCheckpoint(f"checkpoint {path} can't be read: {error}", hint="check the path and its rights") from None
    use_shipped = given is None and part.shipped is not None and precision == "fp32" and not options
    return _Plan(
        name=name,
        recipe=part,
        family=family,
        inspection=inspection,
        precision=precision,
        sources=files,
        shipped=read_shipped(base / str(part.shipped)) if use_shipped else None,
        folder=(base / part.shipped).parent if part.shipped else base,
    )


def _precision_of(name: str, names: list[str], precision: Precision | Mapping[str, Precision]) -> Precision:
    if not isinstance(precision, str):
        for other in precision:
            if other not in names:
                raise unknown_name("member in precision", other, names)
        precision = precision.get(name, "fp32")
    if precision not in TORCH_NAMES:
        raise unknown_name("precision", precision, TORCH_NAMES)
    return precision


def _previous(output: Path) -> Bundle | None:
    if not is_bundle(output):
        return None
    try:
        return open_bundle(output, verify="size")
    except BadBundle as error:
        _log.warning("%s is replaced, and nothing of it reused: %s", output, error.message)
        return None


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of these packages, without importing them; those that are missing are left out."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, kw_only=True)
class _Builder:
    compiler: Compiler
    previous: Bundle | None
    report: Progress

    def fill(self, staging: Path, plans: list[_Plan], spec: Recipe, base: Path, recipe: str) -> Manifest:
        versions = versions_of(("tstitch-trt",))
        members: dict[str, Member] = {}
        for index, plan in enumerate(plans):
            part = replace(self, report=self._share(plan.name, index, len(plans)))
            member, used = part.export(plan, staging)
            versions |= used
            engine = self.compiler.engine(
                plan.name,
                member,
                partial(part.model, plan, member, staging),
                staging,
                previous=self.previous,
                report=part.compiling,
            )
            engines = self.compiler.beside(plan.name, member, engine, staging, previous=self.previous)
            members[plan.name] = msgspec.structs.replace(member, engines=engines)
        versions[self.compiler.backend.name] = self.compiler.backend.version()
        if self.previous is not None:
            backends = {record.identity.backend for member in members.values() for record in member.engines}
            old = self.previous.manifest.versions
            versions |= {name: old[name] for name in backends if name in old and name not in versions}
        quality = None
        if spec.quality is not None:
            quality = Quality(
                network=_copy(base / spec.quality.network, staging, "quality"),
                reference=_copy(base / spec.quality.reference, staging, "quality"),
            )
        self.report("done", 1.0)
        return Manifest(
            schema=SCHEMA,
            name=spec.name,
            recipe=recipe,
            versions=versions,
            latent=spec.latent,
            noise=spec.noise,
            conditioning=spec.conditioning,
            defaults=spec.defaults,
            decoder=spec.decoder,
            members=members,
            quality=quality,
        )

    def _share(self, name: str, index: int, count: int) -> Progress:
        return lambda phase, share: self.report(f"{name}: {phase}", (index + share) / count)

    def compiling(self, phase: str, share: float) -> None:
        self.report(f"compile, {phase}", 0.6 + 0.4 * share)

    def export(self, plan: _Plan, staging: Path) -> tuple[Member, dict[str, str]]:
        """The member's ONNX in the bundle: shipped, from the cache, or exported now."""
        if plan.shipped is not None:
            files = [plan.folder / part.path for part in plan.shipped.member.onnx]
            check, versions = plan.shipped.member.check, plan.shipped.versions
            _log.info("member %s: reused the shipped ONNX graph", plan.name)
        else:
            from tstitch_export.exporter import export_onnx

            def make(folder: Path) -> dict[str, object]:
                found = export_onnx(
                    plan.family,
                    plan.inspection,
                    precision=plan.precision,
                    folder=folder,
                    progress=lambda phase, share: self.report(f"export, {phase}", 0.6 * share),
                )
                return {
                    "what": what,
                    "check": msgspec.to_builtins(found),
                    "versions": versions_of(plan.inspection.libraries),
                }

            what = f"member {plan.name}: {plan.precision} ONNX"
            entry = from_cache(self.compiler.cache, self._export_key(plan, "onnx"), make, what)
            files = sorted(entry.files.values(), key=lambda file: file.suffix != ".onnx")
            check = msgspec.convert(entry.info["check"], ExportCheck)
            versions = dict(entry.info["versions"])
        member = Member(
            family=plan.recipe.family,
            parametrisation=plan.recipe.parametrisation,
            precision=plan.precision,
            learned_variance=plan.inspection.learned_variance,
            inputs=plan.family.inputs(plan.inspection, plan.precision),
            outputs=plan.family.outputs(plan.inspection, plan.precision),
            onnx=tuple(_copy(file, staging, plan.name) for file in files),
            sources=plan.sources,
            check=check,
            config=dict(plan.inspection.config),
        )
        return member, versions

    def model(self, plan: _Plan, member: Member, staging: Path) -> Path:
        if self.compiler.backend.model_kind == "onnx":
            return staging / member.onnx[0].path
        from tstitch_export.exporter import PROGRAM, export_program

        def make(folder: Path) -> dict[str, object]:
            export_program(
                plan.family,
                plan.inspection,
                precision=plan.precision,
                output=folder / PROGRAM,
                progress=lambda phase, share: self.report(f"export, {phase}", 0.6 + 0.2 * share),
            )
            return {"what": what}

        what = f"member {plan.name}: exported program"
        key = self._export_key(plan, "exported-program")
        return from_cache(self.compiler.cache, key, make, what).files[PROGRAM]

    def _export_key(self, plan: _Plan, kind: str) -> str:
        from tstitch_export.exporter import OPSET

        return digest(
            {
                "schema": _EXPORT_SCHEMA,
                "kind": kind,
                "family": plan.family.name,
                "layout": plan.inspection.layout,
                "config": dict(plan.inspection.config),
                "sources": [source.sha256 for source in plan.sources],
                "precision": plan.precision,
                "opset": OPSET[plan.precision],
                "versions": versions_of(plan.inspection.libraries),
            }
        )


def _copy(source: Path, staging: Path, folder: str) -> Component:
    return copy_component(source, staging, f"{folder}/{source.name}")
