"""``tstitch-trt ui``: draw in the browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import LoadOptions

__all__ = ["command"]

EXAMPLES = """
tstitch-trt ui fashion.bundle
tstitch-trt ui fashion.bundle --port 0 --threads 4
tstitch-trt ui sd15.bundle --backend torch --host 0.0.0.0 --port 8080
"""


@dataclass(frozen=True, kw_only=True)
class Address:
    host: str = option("0.0.0.0: all that reach this machine.", "ADDRESS", default="127.0.0.1")
    port: int = option("0: any free one.", "N", default=7860, least=0, most=65535)


@tstitch_command("ui", EXAMPLES, json=False, address=Address, load=LoadOptions)
def command(bundle: Path, address: Address, load: LoadOptions) -> None:
    """Serve a page that draws from BUNDLE at any stitch point, until Ctrl-C.

    Class or prompt, steps, seed, guidance, solver and the share of the steps on the first member; the same seeds at
    several shares side by side with the time per image; the plot of time and quality with the chosen point. The page
    asks nothing of the network. The address is printed to stdout. Needs gradio: pip install "tstitch-trt[ui]".
    """
    import tempfile
    from contextlib import ExitStack

    from tstitch_trt.progress import log
    from tstitch_trt.report.samples import undrawable
    from tstitch_trt.study.fractions import warm_up_fractions
    from tstitch_trt.ui.app import build_page, import_gradio, serving, wait_for_interrupt

    free = _free(address.host, address.port)
    with tempfile.TemporaryDirectory(prefix="tstitch-ui-") as temporary, ExitStack() as stack:
        gradio = import_gradio(temporary=temporary)
        runtime = stack.enter_context(load.open(bundle))
        manifest = runtime.manifest
        if (reason := undrawable(manifest)) is not None:
            raise BadInput(reason, hint=f"tstitch-trt sample {bundle} takes what such a bundle needs")
        pictures = {"labels": [0]} if manifest.conditioning.kind == "class" else {"prompt": ""}
        warm_up_fractions(runtime, {**pictures, "guidance": manifest.defaults.guidance})
        page = build_page(gradio, runtime, str(bundle), temporary=Path(temporary))
        with serving(gradio, page, host=address.host, port=free) as url:
            click.echo(url)
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
