"""A network's ONNX and exported program: from the cache of earlier builds, or made now."""

from __future__ import annotations

import logging
import math
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.bundle.cache import Cache
from tstitch_engines.bundle.files import copy_component
from tstitch_engines.bundle.identity import digest
from tstitch_engines.bundle.manifest import Component, ExportCheck, Network
from tstitch_engines.bundle.weights import WEIGHTS
from tstitch_engines.child import DEFAULT, Limits, free_memory, show_size
from tstitch_engines.compile.engine import from_cache
from tstitch_engines.errors import OutOfMemory
from tstitch_engines.progress import Progress
from tstitch_export.checkpoint.checkpoint import read_checkpoint
from tstitch_export.onnx_export.in_child import export_in_child
from tstitch_export.planning.network import NetworkPlan

__all__ = ["copy_into", "exported_network", "exported_program", "versions_of"]

_log = logging.getLogger(__name__)

_EXPORT_SCHEMA: Final = 4  # part of every export's cache key: raise it when exporter, graph work or a model changes


def exported_network(
    plan: NetworkPlan, staging: Path, *, cache: Cache, report: Progress, limits: Limits = DEFAULT
) -> tuple[Network, dict[str, str]]:
    """The network's ONNX and run-time files in the bundle: shipped, from the cache, or exported now.

    Raises ``OutOfMemory`` before an export that needs more memory than is free, or than ``limits`` allow.
    """
    assets: dict[str, Path] = {}
    if plan.shipped is not None:
        assert plan.folder is not None, "a shipped member has its folder"
        files = [plan.folder / part.path for part in plan.shipped.member.onnx]
        check, versions = plan.shipped.member.check, plan.shipped.versions
        _log.info("%s: reused the shipped ONNX graph", plan.what)
    else:
        from tstitch_export.onnx_export.exporter import WEIGHT_MAP

        def make(folder: Path) -> dict[str, object]:
            _check_memory(plan, limits)
            found = export_in_child(
                plan.family,
                plan.inspection,
                precision=plan.precision,
                opset=plan.opset,
                folder=folder,
                progress=lambda phase, share: report(f"export, {phase}", share),
                limits=limits,
                what=plan.what,
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
        entry = cache.keep(from_cache(cache, _key(plan, "onnx"), make, what))
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
        onnx=tuple(copy_into(file, staging, plan.name) for file in files),
        sources=plan.sources,
        check=check,
        config=dict(plan.inspection.config),
        multiples={name: dim.multiple for name, dim in plan.family.dims(plan.inspection).items() if dim.multiple > 1},
        files={purpose: copy_into(path, staging, plan.name) for purpose, path in assets.items()},
    )
    return network, versions


def exported_program(plan: NetworkPlan, *, cache: Cache, report: Progress, limits: Limits = DEFAULT) -> Path:
    """The network as torch.export made it, which backends other than those of ONNX compile. Raises ``OutOfMemory``."""
    from tstitch_export.onnx_export.exporter import PROGRAM

    def make(folder: Path) -> dict[str, object]:
        _check_memory(plan, limits)
        export_in_child(
            plan.family,
            plan.inspection,
            precision=plan.precision,
            opset=plan.opset,
            folder=folder,
            progress=lambda phase, share: report(f"export, {phase}", share),
            limits=limits,
            what=plan.what,
            program=PROGRAM,
        )
        return {"what": what}

    what = f"{plan.what}: exported program"
    return cache.keep(from_cache(cache, _key(plan, "exported-program"), make, what)).files[PROGRAM]


def _check_memory(plan: NetworkPlan, limits: Limits) -> None:
    """The weights are in memory once in float32, whatever they are stored in; more often for a while."""
    known, alone = plan.inspection.config.get("parameters"), plan.inspection.layout in ("published", "diffusers")
    if known is None and not alone:
        return  # one of several networks in its file
    shapes = read_checkpoint(plan.inspection.files[-1]).shapes if known is None else {}
    numbers = int(known) if known is not None else sum(math.prod(shape) for shape in shapes.values())
    free = free_memory()
    allowed = limits.memory if limits.memory is not None else free
    if allowed is not None and 4 * numbers > allowed:
        have = f"{show_size(allowed)} are free" if limits.memory is None else f"its limit is {show_size(allowed)}"
        raise OutOfMemory(
            f"exporting {plan.what} needs {show_size(4 * numbers)} of memory or more "
            f"({numbers:,} weights in float32), and {have}",
            hint="free memory, raise --memory-limit (memory_limit=), or build on a larger machine and copy the bundle",
        )


def copy_into(source: Path, staging: Path, folder: str) -> Component:
    """Copies a file to ``staging/folder`` and hashes it."""
    return copy_component(source, staging, f"{folder}/{source.name}")


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of these packages, without importing them; those that are missing are left out."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _key(plan: NetworkPlan, kind: str) -> str:
    return digest(
        {
            "schema": _EXPORT_SCHEMA,
            "kind": kind,
            "family": plan.family.name,
            "layout": plan.inspection.layout,
            "config": dict(plan.inspection.config),
            "sources": [source.sha256 for source in plan.sources],
            "precision": plan.precision,
            "opset": plan.opset,
            "versions": versions_of(plan.inspection.libraries),
        }
    )
