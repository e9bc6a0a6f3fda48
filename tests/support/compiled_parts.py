"""Parts of a bundle (text encoder, VAE) exported and compiled for ONNX Runtime without a bundle around them."""

from __future__ import annotations

from pathlib import Path

from tstitch_engines.backends import open_backend
from tstitch_engines.backends.base import Backend
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity, Network, Precision
from tstitch_engines.device.open import open_device
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.families import Family, Inspection
from tstitch_export.onnx_export.exporter import GRAPH, export_onnx
from tstitch_trt.runtime.component import Component

__all__ = ["compile_part", "export_network", "load_part"]


def export_network(family: Family, found: Inspection, folder: Path, *, precision: Precision = "fp32") -> Network:
    """Exports into the new ``folder``."""
    folder.mkdir(parents=True)
    export_onnx(family, found, precision=precision, folder=folder, progress=silent)
    return Network(
        family=family.name,
        precision=precision,
        inputs=family.inputs(found, precision),
        outputs=family.outputs(found, precision),
        onnx=(),
        sources=(),
        check=None,
        config=dict(found.config),
    )


def compile_part(backend: Backend, network: Network, folder: Path, profile: dict[str, Range]) -> Path:
    return backend.compile(
        member=network,
        model=folder / GRAPH,
        profile=ShapeProfile(profile),
        device="cpu",
        options={},
        output=folder / f"{len(list(folder.iterdir()))}{backend.engine_suffix}",
        progress=silent,
    )[0]


def load_part(name: str, network: Network, folder: Path, profile: dict[str, Range]) -> Component:
    """Compiles what ``export_network`` wrote and loads it on the CPU."""
    backend = open_backend("onnxruntime")
    identity = EngineIdentity(
        schema=SCHEMA,
        backend=backend.name,
        backend_version=backend.version(),
        onnx_sha256="",
        precision=network.precision,
        profile=ShapeProfile(profile),
        arch=backend.arch("cpu"),
    )
    device = open_device("cpu")
    path = compile_part(backend, network, folder, profile)
    engine = backend.load(path, member=network, identity=identity, device=device, threads=1)
    return Component(name, network, engine, device)
