"""Builds a bundle: recipe -> checkpoints -> ONNX -> engines -> one directory, reusing every unchanged component."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import Bundle, is_bundle, open_bundle, write_bundle
from tstitch_engines.bundle.cache import Cache
from tstitch_engines.bundle.manifest import SCHEMA, Defaults, Manifest, Member, Network, Precision, Quality
from tstitch_engines.checks import (
    check_callable,
    check_checkpoints,
    check_path,
    check_precision,
    check_switch,
    check_text,
    check_type,
    checked,
    optional,
    read_mapping,
    taken_as_is,
)
from tstitch_engines.child import Limits
from tstitch_engines.compile.engine import Compiler
from tstitch_engines.errors import BadBundle
from tstitch_engines.progress import Progress, silent
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_engines.version import VERSION
from tstitch_export.families.base import Scalar
from tstitch_export.families.options import typed
from tstitch_export.onnx_export.network import copy_into, exported_network, exported_program, versions_of
from tstitch_export.planning.bundle import BundlePlan, plan_bundle
from tstitch_export.planning.compatibility import PairConventions
from tstitch_export.planning.network import NetworkPlan
from tstitch_export.planning.recipe import Recipe

__all__ = ["build", "versions_of"]

_log = logging.getLogger(__name__)


@checked(
    recipe=check_path,
    members=optional(check_checkpoints),
    parts=optional(check_checkpoints),
    output=check_path,
    backend=partial(check_text, example="onnxruntime", most=100),
    precision=check_precision,
    profile=optional(partial(check_type, kind=Range)),
    height=optional(partial(check_type, kind=Range)),
    width=optional(partial(check_type, kind=Range)),
    tokens=optional(partial(check_type, kind=Range)),
    device=partial(check_text, example="cpu", most=100),
    options=optional(partial(read_mapping, example='{"small.controlled": False}')),
    fresh=check_switch,
    progress=optional(check_callable),
    time_limit=taken_as_is,
    memory_limit=taken_as_is,
)
def build(
    recipe: str | Path,
    *,
    members: Mapping[str, str | Path] | None = None,
    parts: Mapping[str, str | Path] | None = None,
    output: Path,
    backend: str = "onnxruntime",
    precision: Precision | Mapping[str, Precision] = "fp32",
    profile: Range | None = None,
    height: Range | None = None,
    width: Range | None = None,
    tokens: Range | None = None,
    device: str = "cpu",
    options: Mapping[str, Scalar] | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    time_limit: float | str | None = None,
    memory_limit: int | str | None = None,
) -> Manifest:
    """Builds the bundle ``output`` and returns its manifest.

    ``members`` gives checkpoints by member name, besides or instead of the recipe's own; ``parts`` folders of text
    encoders, VAE and ControlNet instead of those in the members' pipelines (a member's own text encoder is
    ``MEMBER_text_encoder``). Each is a path, or the text ``ORG/NAME``, ``ORG/NAME/PATH`` or ``...@REVISION`` of a
    Hugging Face repository, where no such file or folder exists; the files that are needed are taken from its local
    cache or downloaded. ``precision``: one for all (VAEs stay fp32), or by name with fp32 as the default.
    ``profile``: the batch range, in rows of the engines: an image takes one, with guidance two. By default up to 16,
    tuned for 8 images: 16 rows where the recipe guides, else 8. ``height`` and ``width`` are ranges in pixels (default:
    the last member's native size), ``tokens`` of prompts (default: up to 231). ``options``: the
    backend's, ``NAME.OPTION`` for the family of a member or part, and ``opset`` of all exports (20 to 23; by default 20
    for fp32, else 23 or what the backend takes: from 23 on attention is one node).

    Exports and engines that did not change come from the cache or the bundle that is replaced, unless ``fresh``; an
    interrupted build goes on there. Engines for other backends and machines are kept where the ONNX is the same.
    ``output`` is replaced in one step at the end.

    Each network is compiled in a child process, which is ended after ``time_limit`` (seconds, or ``30m``; 2 hours by
    default) or when it holds more than ``memory_limit`` (bytes, or ``8GiB``; by default what is free when it starts).
    An export whose weights alone need more is refused before it starts.

    Raises ``BadInput`` before anything is built, ``BuildFailed`` when an export or a compilation fails or the disk is
    full, ``OutOfTime`` and ``OutOfMemory`` at those limits, ``Unavailable`` when a library is missing.
    """
    limits = Limits.of(time_limit, memory_limit)
    report = progress or silent
    opened = open_backend(backend)
    plan = plan_bundle(
        recipe,
        members=members or {},
        parts=parts or {},
        precision=precision,
        options=options or {},
        check=lambda common: typed(common, opened.options, what=f"backend {backend!r}"),
        opset_limits=opened.opset_limits,
        progress=report,
    )
    settings = plan.options
    compiler = Compiler(
        backend=opened,
        device=device,
        profile=ShapeProfile({}),  # each network has its own
        settings=settings,
        cache=Cache(fresh=fresh),
        limits=limits,
    )
    sizes = plan.sizes(batch=profile, height=height, width=width, tokens=tokens)
    profiles = {network.name: network.profile(sizes) for network in plan.networks}
    for note in plan.conventions.notes:
        _log.info("%s", note)
    builder = _Builder(compiler=compiler, profiles=profiles, previous=_previous(output), report=report)
    return write_bundle(output, lambda staging: builder.fill(staging, plan, Path(str(recipe)).name)).manifest


def _previous(output: Path) -> Bundle | None:
    if not is_bundle(output):
        return None
    try:
        return open_bundle(output, verify="size")
    except BadBundle as error:
        _log.warning("%s is replaced, and nothing of it reused: %s", output, error.message)
        return None


@dataclass(frozen=True, kw_only=True)
class _Builder:
    compiler: Compiler
    profiles: Mapping[str, ShapeProfile]
    previous: Bundle | None
    report: Progress

    def fill(self, staging: Path, plan: BundlePlan, recipe: str) -> Manifest:
        """``recipe`` is the name or path that was given."""
        spec, conventions = plan.recipe, plan.conventions
        versions = {"tstitch-trt": VERSION}
        made: dict[str, Network] = {}
        for index, planned in enumerate(plan.networks):
            report = _within(self.report, index / len(plan.networks), 1 / len(plan.networks), f"{planned.name}: ")
            export, cache = _within(report, 0.0, 0.6), self.compiler.cache
            network, used = exported_network(planned, staging, cache=cache, report=export, limits=self.compiler.limits)
            versions |= used
            made[planned.name] = self.compiled(planned, network, staging, report)
        versions[self.compiler.backend.name] = self.compiler.backend.version()
        if self.previous is not None:
            backends = {record.identity.backend for network in made.values() for record in network.engines}
            old = self.previous.manifest.versions
            versions |= {name: old[name] for name in backends if name in old and name not in versions}
        quality = None
        if spec.quality is not None:
            quality = Quality(
                network=copy_into(plan.base / spec.quality.network, staging, "quality"),
                reference=copy_into(plan.base / spec.quality.reference, staging, "quality"),
            )
        self.report("done", 1.0)
        return Manifest(
            schema=SCHEMA,
            name=spec.name,
            recipe=recipe,
            versions=versions,
            latent=conventions.latent,
            noise=conventions.noise,
            conditioning=spec.conditioning,
            defaults=_defaults(spec, conventions),
            decoder=conventions.decoder,
            members={member.name: _member(member, made[member.name], conventions) for member in plan.members},
            parts={name: made[name] for name in plan.parts},
            quality=quality,
            notes=conventions.notes,
        )

    def compiled(self, plan: NetworkPlan, network: Network, staging: Path, report: Progress) -> Network:
        """``network`` with its engine, and those that the old bundle has for other backends."""
        compiler = replace(self.compiler, profile=self.profiles[plan.name])

        def program() -> Path:
            return exported_program(
                plan, cache=compiler.cache, report=_within(report, 0.6, 0.2), limits=compiler.limits
            )

        engines = compiler.engines(
            plan.name,
            network,
            staging,
            what=plan.what,
            previous=self.previous,
            report=_within(report, 0.6, 0.4, "compile, "),
            model=None if compiler.backend.model_kind == "onnx" else program,
        )
        return msgspec.structs.replace(network, engines=engines)


def _within(report: Progress, start: float, length: float, word: str = "") -> Progress:
    """Reports a part of the work: shares from ``start`` on, phases that begin with ``word``."""
    return lambda phase, share: report(f"{word}{phase}", start + length * share)


def _defaults(spec: Recipe, conventions: PairConventions) -> Defaults:
    """The recipe's, with solver and spacing of the governing pipeline's scheduler."""
    if conventions.scheduler is None:
        return spec.defaults
    found = conventions.scheduler
    return msgspec.structs.replace(
        spec.defaults, solver=found.solver, spacing=found.spacing, solver_options=dict(found.options)
    )


def _member(plan: NetworkPlan, network: Network, conventions: PairConventions) -> Member:
    found, adapted = plan.inspection, conventions.members[plan.name]
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
