"""``tstitch-trt ui``: draw in the browser."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from tstitch_engines.errors import BadInput
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import LoadOptions

__all__ = ["command"]

EXAMPLES = """
tstitch-trt ui fashion.bundle
tstitch-trt ui fashion.bundle --port 0 --threads 4
tstitch-trt ui sd15.bundle --backend torch --host 0.0.0.0 --port 8080
tstitch-trt ui sd15.bundle --host 0.0.0.0 --token-file token.txt --allow-host gpu.example.org
"""


@dataclass(frozen=True, kw_only=True)
class Address:
    host: str = option(
        "Address to listen on; 0.0.0.0 for every network of this machine.", "ADDRESS", default="127.0.0.1"
    )
    port: int = option("Port to listen on; 0 for a free one.", "N", default=7860, least=0, most=65535)
    allow_host: tuple[str, ...] = option(
        "Another name that browsers may ask for, e.g. behind a proxy or tunnel. May be repeated.", "NAME[:PORT]"
    )
    token_file: Path | None = option(
        "The token that visitors must know, 16 characters or more. [made anew unless --host is this machine alone]",
        "FILE",
    )
    max_lanes: int | None = option("Images drawn at once. [2 x the bundle's largest batch]", "N", least=1)
    max_queue: int = option(
        "Images that may wait, half as many from one address. More are told when to try again.",
        "N",
        default=256,
        least=96,
    )


@tstitch_command("ui", EXAMPLES, json=False, address=Address, load=LoadOptions)
def command(bundle: Path, address: Address, load: LoadOptions) -> None:
    """Serve a page that draws from BUNDLE at any stitch point, until Ctrl-C.

    The page has class or prompt, steps, seed, guidance, solver and the share of the steps on the first member. It shows
    the same seeds at several shares side by side, with the time of each, and the plot of time and quality with the
    chosen point. Visitors draw at the same time and share batches. The page loads nothing from the network.

    The address is printed to stdout. With a --host that other machines reach, it has a token, which visitors must know.
    Needs gradio: pip install "tstitch-trt[ui]".
    """
    import secrets
    import tempfile
    import threading
    from contextlib import ExitStack

    from tstitch_trt.progress import log, progress_bar
    from tstitch_trt.report.samples import undrawable
    from tstitch_trt.serve.engine import Engine
    from tstitch_trt.serve.listen import is_loopback, listen
    from tstitch_trt.ui.app import build_page, import_gradio, serving
    from tstitch_trt.ui.drawing import StepTimes
    from tstitch_trt.ui.guard import Guard, read_token
    from tstitch_trt.ui.visitors import Drawings

    token = None if is_loopback(address.host) else secrets.token_urlsafe(24)
    if address.token_file is not None:
        token = read_token(address.token_file)
    drawings = Drawings(address.max_queue // 2)
    cut_off = False
    try:
        with ExitStack() as stack:
            listening = stack.enter_context(listen(address.host, address.port))
            port = int(listening.getsockname()[1])
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tstitch-ui-"))).resolve()
            gradio = import_gradio(temporary=str(temporary))
            runtime = stack.enter_context(load.open(bundle))
            if (reason := undrawable(runtime.manifest)) is not None:
                raise BadInput(reason, hint=f"tstitch-trt sample {bundle} takes what such a bundle needs")
            times = StepTimes()
            engine = Engine(runtime, max_lanes=address.max_lanes, max_queue=address.max_queue, observer=times)
            stack.callback(engine.close, cancel=True)
            with progress_bar("warming up") as bar:
                engine.warm_up(bar)
            page = build_page(
                gradio, engine, str(bundle), temporary=temporary, drawings=drawings, times=times
            )  # fmt: skip
            guarded = partial(
                Guard, host=address.host, port=port, names=address.allow_host, token=token, pictures=temporary,
                visitors=drawings.visitors,
            )  # fmt: skip
            with serving(gradio, page, listening, guarded, pictures=temporary):
                try:
                    click.echo(_url(address.host, port, token))
                    log("Ctrl-C stops it")
                    threading.Event().wait()
                finally:
                    cut_off = len(drawings) > 0
                    engine.close(cancel=True)
    except KeyboardInterrupt:
        if cut_off:
            raise
        log("stopped")  # as it was told to, and nobody lost a drawing


def _url(host: str, port: int, token: str | None) -> str:
    """The page's address in this machine's browser."""
    from tstitch_trt.serve.listen import address_of

    return address_of(host, port) + (f"?token={token}" if token else "")
