"""``tstitch-trt export-triton``: a model repository for Triton Inference Server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import signature_option, threads_option, trust_option

__all__ = ["command"]

EXAMPLES = """
tstitch-trt export-triton fashion.bundle -o models
tstitch-trt export-triton fashion.bundle -o models --name shoes --threads 4 --max-queue 64
tstitch-trt export-triton sd15.bundle -o models --device cuda --json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path = option("The model repository that the model is added to.", "REPO", "-o", "--output", required=True)
    name: str | None = option("The model's name in Triton. [the bundle's file name]", "NAME")
    require_signature: Path | None = signature_option()


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """The keywords of ``ServerOptions``."""

    device: Literal["cpu", "cuda"] = option("One engine on the CPU, or one on each GPU.", default="cpu")
    backend: str | None = option("Backend whose engines to load. [the first that the bundle was built for]", "NAME")
    threads: int | None = threads_option()
    trust: bool = trust_option()
    max_lanes: int | None = option("Images drawn at once. [twice the largest batch]", "N", least=1)
    max_queue: int = option("Images that may wait. More are refused.", "N", default=256, least=1)


@tstitch_command("export-triton", EXAMPLES, what=Options, flags=EngineFlags)
def command(bundle: Path, what: Options, flags: EngineFlags, as_json: bool) -> None:
    """Write BUNDLE as a model of Triton's Python backend, with a copy of the bundle.

    The Python of Triton's backend needs tstitch-trt: pip install "tstitch-trt[cpu]", with a NumPy that this version of
    Triton supports (below 2 for Triton 24.10). Batching is done by tstitch-trt, not by Triton.
    """
    from tstitch_engines.bundle.bundle import open_bundle
    from tstitch_trt.cli._text import print_json
    from tstitch_trt.files import require_parent
    from tstitch_trt.progress import log
    from tstitch_trt.serve.triton import ServerOptions, write_repository

    require_parent(what.output, option="-o")
    opened = open_bundle(bundle, require_signature=what.require_signature)
    name = what.name or bundle.resolve().name.removesuffix(".bundle")
    folder = write_repository(opened, what.output, name=name, options=ServerOptions(**asdict(flags)))
    if as_json:
        from tstitch_trt.cli._documents import TritonOutput

        print_json(TritonOutput(model=name, folder=str(folder), repository=str(what.output)))
        return
    log(f"tritonserver --model-repository {what.output}")
    click.echo(folder)
