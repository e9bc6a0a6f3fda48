"""Parts of a bundle (text encoder, VAE) exported and compiled for ONNX Runtime without a bundle around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from support.exports import graph_of, network_plan, onnx_of
from tstitch_engines.backends import open_backend
from tstitch_engines.backends.base import Backend
from tstitch_engines.bundle.manifest import SCHEMA, EngineIdentity, Network
from tstitch_engines.compile.load import load_own
from tstitch_engines.device.open import open_device
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_export.families.base import Scalar
from tstitch_trt.runtime.component import Component

__all__ = ["compile_part", "export_network", "load_part"]


def export_network(family: str, path: Path, folder: Path, options: Mapping[str, Scalar] | None = None) -> Network:
    """Into the new ``folder``, through the cache that all tests of a run share."""
    return onnx_of(network_plan(family, path, options), folder)


def compile_part(backend: Backend, network: Network, folder: Path, profile: dict[str, Range]) -> Path:
    return backend.compile(
        member=network,
        model=graph_of(network, folder),
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
    files = [path, *path.parent.glob(f"{path.name}.*")]
    engine = load_own(backend, files, network, identity, device, threads=1)
    return Component(name, network, engine, device)
