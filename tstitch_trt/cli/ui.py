"""``tstitch-trt ui``: draw in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.cli._command import Command, traceback_option
from tstitch_trt.cli._options import bundle_argument, load_runtime, runtime_options

if TYPE_CHECKING:
    from tstitch_trt.runtime.step_graphs import GraphMode

__all__ = ["command"]

EXAMPLES = """
tstitch-trt ui fashion.bundle
tstitch-trt ui fashion.bundle --port 0 --threads 4
tstitch-trt ui sd15.bundle --backend torch --host 0.0.0.0 --port 8080
"""


@click.command("ui", cls=Command, examples=EXAMPLES)
@bundle_argument
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="0.0.0.0: all that reach this machine."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, metavar="N", help="0: any free one."
)
@runtime_options
@traceback_option
def command(
    bundle: Path,
    host: str,
    port: int,
    device: str,
    backend: str | None,
    threads: int | None,
    graph: GraphMode,
    rebuild: bool,
) -> None:
    """Serve a page that draws from BUNDLE at any stitch point, until Ctrl-C.

    Class or prompt, steps, seed, guidance, solver and the share of the steps on the first member; the same seeds at
    several shares side by side with the time per image; the plot of time and quality with the chosen point. The page
    asks nothing of the network. The address is printed to stdout. Needs gradio: pip install "tstitch-trt[ui]".
    """
    import tempfile
    from contextlib import ExitStack

    from tstitch_trt.progress import log
    from tstitch_trt.report.samples import undrawable
    from tstitch_trt.ui.app import build_page, import_gradio, serving, wait_for_interrupt
    from tstitch_trt.ui.draw import warm_up

    free = _free(host, port)
    with tempfile.TemporaryDirectory(prefix="tstitch-ui-") as temporary, ExitStack() as stack:
        gradio = import_gradio(temporary=temporary)
        runtime = stack.enter_context(
            load_runtime(bundle, device=device, backend=backend, threads=threads, graph=graph, rebuild=rebuild)
        )
        manifest = runtime.manifest
        if (reason := undrawable(manifest)) is not None:
            raise BadInput(reason, hint=f"tstitch-trt sample {bundle} takes what such a bundle needs")
        pictures = {"labels": [0]} if manifest.conditioning.kind == "class" else {"prompt": ""}
        warm_up(runtime, pictures, manifest.defaults.guidance)
        page = build_page(gradio, runtime, str(bundle), temporary=Path(temporary))
        with serving(gradio, page, host=host, port=free) as address:
            click.echo(address)
            log("Ctrl-C stops it")
            wait_for_interrupt()
    log("stopped")


def _free(host: str, port: int) -> int:
    """``port``, or for 0 one that is free. Raises ``Unavailable`` and ``BadInput``."""
    import socket

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise BadInput(f"--host {host!r} is no address: {error}", hint="--host 127.0.0.1") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Unavailable(
                f"{host}:{port} can't be listened on: {error.strerror}", hint="choose another, or any: --port 0"
            ) from None
        return int(probe.getsockname()[1])
