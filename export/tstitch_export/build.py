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
from tstitch_engines.errors import BadBundle
from tstitch_engines.files import copy_component
from tstitch_engines.identity import digest
from tstitch_engines.manifest import (
    SCHEMA,
    Component,
    Defaults,
    ExportCheck,
    Manifest,
    Member,
    Network,
    Precision,
    Quality,
)
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_engines.weights import WEIGHTS
from tstitch_export.compatibility import Agreement, agree
from tstitch_export.families import open_family
from tstitch_export.families.base import Scalar
from tstitch_export.options import split_options, typed
from tstitch_export.planning import NetworkPlan, part_names, plan_member, plan_parts, precision_of
from tstitch_export.recipe import Recipe, check_member_name, load_recipe
from tstitch_export.sizes import sizes_of

__all__ = ["build", "versions_of"]

_log = logging.getLogger(__name__)

_EXPORT_SCHEMA: Final = 3  # part of every export's cache key: raise it when exporter or graph work changes
_DEFAULT_PROFILE: Final = Range(1, 8, 16)


def build(
    recipe: str | Path,
    *,
    members: Mapping[str, Path] | None = None,
    parts: Mapping[str, Path] | None = None,
    output: Path,
    backend: str = "onnxruntime",
    precision: Precision | Mapping[str, Precision] = "fp32",
    profile: Range = _DEFAULT_PROFILE,
    height: Range | None = None,
    width: Range | None = None,
    tokens: Range | None = None,
    device: str = "cpu",
    options: Mapping[str, Scalar] | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Builds the bundle ``output`` and returns its manifest.

    ``members`` gives checkpoints by member name, in place of or in addition to the recipe's own; ``parts`` folders of
    text encoders, VAE and ControlNet, in place of those in the members' pipelines; a member's own text encoder is
    called ``MEMBER_text_encoder``. ``precision`` is one for all (but VAEs, which stay fp32) or one by name (fp32 where
    none is given). ``profile`` is the batch range of the engines; with guidance one image takes two places. ``height``
    and ``width`` are ranges in pixels, ``tokens`` of prompts; the last member's native size and prompts of up to 231
    tokens where they are ``None``. ``options`` holds the backend's options, and ``NAME.OPTION`` for the family of a
    member or part.

    What did not change is reused: exports and engines come from the cache or from the bundle that is replaced, and
    engines that bundle has for other backends or machines are kept where the ONNX is the same. An interrupted build
    goes on from the cache. ``fresh`` makes all of it again, for engines that fail though every hash is right.
    ``output`` is replaced in one step at the end or not at all.

    Raises ``BadInput`` and its kinds before anything is built, ``BuildFailed`` when an export or a compilation fails
    or the disk is full, ``Unavailable`` when a library is missing.
    """
    report = progress or (lambda phase, share: None)
    spec, base = load_recipe(recipe)
    opened = open_backend(backend)
    given, beside = dict(members or {}), dict(parts or {})
    for name in given:
        check_member_name(name)
    names = [*spec.members, *(name for name in given if name not in spec.members)]
    known = [*names, *part_names(spec, names)]
    common, own = split_options(options or {}, known)
    settings = typed(common, opened.options, what=f"backend {backend!r}")
    compiler = Compiler.of(
        opened, device=device, profile=ShapeProfile({"B": profile}), settings=settings, cache=Cache(fresh=fresh)
    )
    if "controlnet" in beside:
        for name in names:
            described = spec.members.get(name) or spec.other_members
            if described is not None and "controlled" in open_family(described.family).options:
                own[name] = {"controlled": True, **own[name]}
    plans = [
        plan_member(name, spec, base, given.get(name), own[name], precision_of(name, known, precision, None))
        for name in names
    ]
    more, left_out = plan_parts(spec, plans, beside, own, precision)
    agreement = agree(spec, plans, more)
    agreement = replace(agreement, notes=(*left_out, *agreement.notes))
    factor = agreement.decoder.factor
    sizes = sizes_of(plans, agreement.latent, factor, batch=profile, height=height, width=width, tokens=tokens)
    profiles = {plan.name: plan.profile(sizes) for plan in (*plans, *more.values())}
    for note in agreement.notes:
        _log.info("%s", note)
    builder = _Builder(compiler=compiler, profiles=profiles, previous=_previous(output), report=report)
    return write_bundle(
        output,
        lambda staging: builder.fill(
            staging, plans, list(more.values()), spec, base, agreement, Path(str(recipe)).name
        ),
    ).manifest


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
    profiles: Mapping[str, ShapeProfile]
    previous: Bundle | None
    report: Progress

    def fill(
        self,
        staging: Path,
        members: list[NetworkPlan],
        parts: list[NetworkPlan],
        spec: Recipe,
        base: Path,
        agreement: Agreement,
        recipe: str,
    ) -> Manifest:
        versions = versions_of(("tstitch-trt",))
        made: dict[str, Network] = {}
        for index, plan in enumerate((*members, *parts)):
            part = replace(self, report=self._share(plan.name, index, len(members) + len(parts)))
            network, used = part.export(plan, staging)
            versions |= used
            made[plan.name] = part.compiled(plan, network, staging)
        versions[self.compiler.backend.name] = self.compiler.backend.version()
        if self.previous is not None:
            backends = {record.identity.backend for network in made.values() for record in network.engines}
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
            latent=agreement.latent,
            noise=agreement.noise,
            conditioning=spec.conditioning,
            defaults=_defaults(spec, agreement),
            decoder=agreement.decoder,
            members={plan.name: _member(plan, made[plan.name], agreement) for plan in members},
            parts={plan.name: made[plan.name] for plan in parts},
            quality=quality,
            notes=agreement.notes,
        )

    def compiled(self, plan: NetworkPlan, network: Network, staging: Path) -> Network:
        """``network`` with its engine, and those that the old bundle has for other backends."""
        compiler = replace(self.compiler, profile=self.profiles[plan.name])
        model = partial(self.model, plan, network, staging)
        engine = compiler.engine(plan.name, network, model, staging, previous=self.previous, report=self.compiling)
        engines = compiler.beside(plan.name, network, engine, staging, previous=self.previous)
        return msgspec.structs.replace(network, engines=engines)

    def _share(self, name: str, index: int, count: int) -> Progress:
        return lambda phase, share: self.report(f"{name}: {phase}", (index + share) / count)

    def compiling(self, phase: str, share: float) -> None:
        self.report(f"compile, {phase}", 0.6 + 0.4 * share)

    def export(self, plan: NetworkPlan, staging: Path) -> tuple[Network, dict[str, str]]:
        """The network's ONNX and run-time files in the bundle: shipped, from the cache, or exported now."""
        assets: dict[str, Path] = {}
        if plan.shipped is not None:
            assert plan.folder is not None, "a shipped member has its folder"
            files = [plan.folder / part.path for part in plan.shipped.member.onnx]
            check, versions = plan.shipped.member.check, plan.shipped.versions
            _log.info("%s: reused the shipped ONNX graph", plan.what)
        else:
            from tstitch_export.exporter import WEIGHT_MAP, export_onnx

            def make(folder: Path) -> dict[str, object]:
                found = export_onnx(
                    plan.family,
                    plan.inspection,
                    precision=plan.precision,
                    folder=folder,
                    progress=lambda phase, share: self.report(f"export, {phase}", 0.6 * share),
                )
                written = dict(plan.family.assets(plan.inspection, folder))
                if (folder / WEIGHT_MAP).exists():
                    written[WEIGHTS] = folder / WEIGHT_MAP
                return {
                    "what": what,
                    "assets": {purpose: path.name for purpose, path in written.items()},
                    "check": msgspec.to_builtins(found),
                    "versions": versions_of(plan.inspection.libraries),
                }

            what = f"{plan.what}: {plan.precision} ONNX"
            entry = from_cache(self.compiler.cache, self._export_key(plan, "onnx"), make, what)
            assets = {purpose: entry.files[name] for purpose, name in entry.info["assets"].items()}
            graph = {name: path for name, path in entry.files.items() if path not in assets.values()}
            files = sorted(graph.values(), key=lambda file: file.suffix != ".onnx")
            check = msgspec.convert(entry.info["check"], ExportCheck)
            versions = dict(entry.info["versions"])
        network = Network(
            family=plan.family.name,
            precision=plan.precision,
            inputs=plan.family.inputs(plan.inspection, plan.precision),
            outputs=plan.family.outputs(plan.inspection, plan.precision),
            onnx=tuple(_copy(file, staging, plan.name) for file in files),
            sources=plan.sources,
            check=check,
            config=dict(plan.inspection.config),
            multiples={
                name: dim.multiple for name, dim in plan.family.dims(plan.inspection).items() if dim.multiple > 1
            },
            files={purpose: _copy(path, staging, plan.name) for purpose, path in assets.items()},
        )
        return network, versions

    def model(self, plan: NetworkPlan, network: Network, staging: Path) -> Path:
        if self.compiler.backend.model_kind == "onnx":
            return staging / network.onnx[0].path
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

        what = f"{plan.what}: exported program"
        key = self._export_key(plan, "exported-program")
        return from_cache(self.compiler.cache, key, make, what).files[PROGRAM]

    def _export_key(self, plan: NetworkPlan, kind: str) -> str:
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


def _defaults(spec: Recipe, agreement: Agreement) -> Defaults:
    """The recipe's, with solver and spacing of the governing pipeline's scheduler. ``agree`` has said what it takes."""
    if agreement.scheduler is None:
        return spec.defaults
    found = agreement.scheduler
    return msgspec.structs.replace(
        spec.defaults, solver=found.solver, spacing=found.spacing, solver_options=dict(found.options)
    )


def _member(plan: NetworkPlan, network: Network, agreement: Agreement) -> Member:
    found, adapted = plan.inspection, agreement.members[plan.name]
    return Member(
        **{name: getattr(network, name) for name in Network.__struct_fields__},
        parametrisation=adapted.parametrisation,
        learned_variance=found.learned_variance,
        noise=adapted.noise,
        latent_ratio=adapted.latent_ratio,
        text=adapted.text,
        guidance_embedding=found.guidance_embedding,
        controlled=found.controlled,
        inpaints=found.inpaints,
    )
