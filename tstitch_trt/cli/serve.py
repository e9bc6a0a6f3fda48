"""``tstitch-trt serve``: images over HTTP."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, Literal

import click

from tstitch_engines.checks import check_number, check_text, shown
from tstitch_engines.errors import BadInput, Busy, Closed, FailedWork, unknown_name
from tstitch_engines.needs import require
from tstitch_trt.cli._command import option, tstitch_command
from tstitch_trt.cli._options import LoadOptions
from tstitch_trt.cli._parsing import parse_pairs, parse_size
from tstitch_trt.cli._signals import caught_signals, queued_signals

if TYPE_CHECKING:
    from logging import Logger

    from tstitch_engines.progress import Progress
    from tstitch_trt.serve.admission import Cheaper
    from tstitch_trt.serve.engine import Engine
    from tstitch_trt.serve.http.auth import Keys
    from tstitch_trt.serve.http.limits import HttpLimits
    from tstitch_trt.serve.reload import Reloader

__all__ = ["command"]

EXAMPLES = """
tstitch-trt serve fashion.bundle
tstitch-trt serve fashion.bundle --port 0 --threads 4 --max-queue 64
tstitch-trt serve sd15.bundle --device cuda --host 0.0.0.0 --api-key-file keys.txt --log-format json
tstitch-trt serve photo=sd15.bundle icons=fashion.bundle --weight photo=3 --weight icons=1
tstitch-trt serve sd15.bundle --max-fraction 0.8 --min-steps 20
"""

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_MOST_STEPS: Final = 1_000_000
_TELL_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0
_FINISH_SECONDS: Final = 5.0  # that answers may take to be written once everything is drawn


@dataclass(frozen=True, kw_only=True)
class AddressOptions:
    host: str = option(
        "Address to listen on; 0.0.0.0 for every network of this machine.", "ADDRESS", default="127.0.0.1"
    )
    port: int = option("Port to listen on; 0 for a free one.", "N", default=8000, least=0, most=65535)
    api_key_file: Path | None = option("A file of API keys, one a line, of 16 characters or more.", "FILE")
    insecure: bool = option("Serve other machines without keys.")
    cors_origin: tuple[str, ...] = option(
        "Pages of this origin may use it from a browser; * for all. May be repeated.", "ORIGIN"
    )
    allow_host: tuple[str, ...] = option(
        "Another name that clients may ask for, without keys on loopback. May be repeated.", "NAME"
    )
    root_path: str = option("The path under which a proxy serves it.", "/PATH", default="")
    max_connections: int = option("Open connections. More are answered 503.", "N", default=1024, least=1, most=100_000)

    def keys(self) -> Keys | None:
        """Raises ``BadInput`` where other machines would be served without keys."""
        from tstitch_trt.serve.http.auth import Keys
        from tstitch_trt.serve.listen import is_loopback

        if self.api_key_file is not None:
            return Keys.read(self.api_key_file)
        if not (self.insecure or is_loopback(self.host)):
            raise BadInput(
                f"--host {shown(self.host)} lets other machines draw, and nobody needs a key",
                hint="--api-key-file FILE (openssl rand -hex 32 > FILE), or --insecure to serve all who reach it",
            )
        return None

    def hosts(self) -> tuple[str, ...]:
        """The values of the header Host that are served; none said is any."""
        from tstitch_trt.serve.listen import is_loopback

        guarded = self.api_key_file is not None or not is_loopback(self.host)
        return self.allow_host if guarded else (*_LOOPBACK, self.host, *self.allow_host)


@dataclass(frozen=True, kw_only=True)
class QueueOptions:
    max_lanes: int | None = option("Images drawn at once, per bundle. [2 x its largest batch]", "N", least=1)
    max_queue: int = option("Images that may wait. More are told when to try again.", "N", default=256, least=1)
    max_queue_memory: str = option("Host memory that waiting requests may take.", "SIZE", default="2GiB")
    timeout: float = option("Seconds from a request's arrival until it is cancelled; 0 for never.", "S", default=300.0)
    weight: tuple[str, ...] = option("Share of the device that a bundle gets. May be repeated. [1]", "NAME=W")
    max_fraction: float | None = option(
        "Under load, requests with a latency budget may get up to this share of their steps on the small member.", "F"
    )
    min_steps: int | None = option(
        "Under load, requests with a latency budget may get as few steps as this.", "N", least=1
    )

    def weights(self, models: Sequence[str]) -> dict[str, float] | None:
        pairs = parse_pairs(self.weight, option="--weight", value="2")
        for name in pairs:
            if name not in models:
                raise unknown_name("bundle", name, models, hint="(in --weight)")
        try:
            found = {name: check_number(float(text), f"--weight {name}", 1e-3, 1e6) for name, text in pairs.items()}
        except ValueError:
            raise BadInput(f"--weight {shown(self.weight)}: a weight is a number", hint="--weight NAME=2") from None
        return found or None

    def cheaper(self) -> Cheaper | None:
        from tstitch_trt.serve.admission import Cheaper

        if self.max_fraction is None and self.min_steps is None:
            return None
        share = 0.0 if self.max_fraction is None else self.max_fraction
        return Cheaper(
            max_fraction=check_number(share, "--max-fraction", 0, 1),
            min_steps=_MOST_STEPS if self.min_steps is None else self.min_steps,
        )


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    max_images: int | None = option("Images in one request. [10]", "N", least=1)
    max_steps: int | None = option("Steps of one image. [250]", "N", least=1)
    max_pixels: int | None = option("Width times height of one image. [4,194,304]", "N", least=1)
    max_prompt: int | None = option("Characters in a prompt. [8,000]", "N", least=1)
    max_body: str | None = option("Size of a request with pictures. [32MiB]", "SIZE")

    def limits(self) -> HttpLimits:
        from tstitch_trt.serve.http.limits import HttpLimits

        body = None if self.max_body is None else parse_size(self.max_body, option="--max-body")
        said = {"images": self.max_images, "steps": self.max_steps, "pixels": self.max_pixels,
                "prompt": self.max_prompt, "body_bytes": body,
                "bodies_bytes": body and max(body, HttpLimits.bodies_bytes)}  # fmt: skip
        return HttpLimits(**{name: value for name, value in said.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class LifeOptions:
    drain_timeout: float = option("Seconds that accepted requests may take after SIGTERM.", "S", default=60.0)
    no_warm_up: bool = option("Be ready at once, before every batch size has run.")
    log_format: Literal["text", "json"] = option(
        "Form of the log, which has one line for each request and event.", default="text"
    )
    log_prompts: bool = option("Write prompts to the log.")


@tstitch_command(
    "serve", EXAMPLES, bundle=False, bundles=True, json=False,
    address=AddressOptions, queue=QueueOptions, allowed=RequestLimits, life=LifeOptions, load=LoadOptions,
)  # fmt: skip
def command(
    bundles: tuple[str, ...], address: AddressOptions, queue: QueueOptions, allowed: RequestLimits, life: LifeOptions,
    load: LoadOptions,
) -> None:  # fmt: skip
    """Serve BUNDLEs over HTTP: OpenAI's images API, whose client works unchanged.

    Requests are batched step by step: images in their small phase share one batch, images in their large phase another,
    whatever their schedules. A model has the name in its bundle's manifest, or NAME. The address is printed to stdout;
    /readyz answers 200 when all batch sizes are warm.

    SIGTERM or Ctrl-C stops admission, finishes what was accepted and exits with 0; a second one exits at once. SIGHUP
    loads bundles that changed and then replaces the old ones. Keys, limits and metrics: docs/how-to/serve.md. Needs
    FastAPI: pip install "tstitch-trt[serve]".
    """
    import logging

    from tstitch_trt.cli._calibration import calibrated_steps
    from tstitch_trt.serve.access import Access, Submissions
    from tstitch_trt.serve.engine import Engine
    from tstitch_trt.serve.front import Front
    from tstitch_trt.serve.http.app import create_app
    from tstitch_trt.serve.http.limits import HttpSettings
    from tstitch_trt.serve.http.openapi import OPERATIONS
    from tstitch_trt.serve.listen import address_of, listen, serving
    from tstitch_trt.serve.logs import logging_to
    from tstitch_trt.serve.metrics import Metrics, metrics_route
    from tstitch_trt.serve.observer import Observers
    from tstitch_trt.serve.reload import Reloader
    from tstitch_trt.serve.tracing import Traces, provider_of_environment

    check_number(life.drain_timeout, "--drain-timeout", 0, 86_400)
    for module in ("fastapi", "uvicorn", "python_multipart"):  # before anything is loaded
        require(module, "the server", extra="serve")
    require("prometheus_client", "/metrics", extra="serve").disable_created_metrics()  # of the whole process: ours
    settings = HttpSettings(
        limits=allowed.limits(), keys=address.keys(), timeout=queue.timeout or None, hosts=address.hosts(),
        cors_origins=address.cors_origin, root_path=address.root_path,
    )  # fmt: skip
    named = _named(bundles)
    weights, cheaper, metrics = queue.weights(list(named)), queue.cheaper(), Metrics()
    waiting = parse_size(queue.max_queue_memory, option="--max-queue-memory")
    provider = provider_of_environment()
    traces = None if provider is None else Traces(provider)
    observers = Observers(Submissions(), metrics, *([] if traces is None else [traces]))
    log, front = logging.getLogger("tstitch_trt.serve"), Front(address.root_path)
    with logging_to(life.log_format), ExitStack() as stack:
        listening = stack.enter_context(listen(address.host, address.port))
        hangups = stack.enter_context(queued_signals(signal.SIGHUP))
        if traces is not None:
            stack.callback(traces.close)
        answering = stack.enter_context(
            serving(
                front,
                listening,
                what="the server",
                extra="serve",
                most_connections=address.max_connections,
                finish=_FINISH_SECONDS,
            )
        )
        try:
            click.echo(address_of(address.host, listening.getsockname()[1]))
            front.doing = "loading"  # names are for who has a key
            log.info("loading %s", ", ".join(named))
            engine = Engine(
                named, max_lanes=queue.max_lanes, max_queue=queue.max_queue, max_queue_bytes=waiting,
                weights=weights, cheaper=cheaper, calibration=calibrated_steps, load=asdict(load),
                observer=observers,
            )  # fmt: skip
            stack.callback(engine.close, cancel=True)
            reload = Reloader(engine, named)
            settings = replace(settings, reload=partial(_reload_over_http, reload))
            app = create_app(engine, settings, extra_routes=[metrics_route(metrics)])
            metrics.watch(engine.state)
            if not life.no_warm_up:
                front.doing = "warming up"
                engine.warm_up(_told(log))
        except (Exception, KeyboardInterrupt, SystemExit):
            if not caught_signals():
                raise
            log.info("stopped before it was ready")  # whatever a library made of the signal
            return
        with queued_signals(signal.SIGINT, signal.SIGTERM, found=hangups) as signals:
            routes = ["/metrics", *(path for path, _, _ in OPERATIONS)]
            front.app = Access(app, routes=routes, metrics=metrics, traces=traces, prompts=life.log_prompts)
            log.info("ready: %s", ", ".join(named))
            while (number := _next(signals, engine, answering)) == signal.SIGHUP:
                threading.Thread(target=_reload, args=(reload,), name="reload", daemon=True).start()
            log.info("%s: finishing what was accepted", signal.Signals(number).name)
            _drain(engine, life.drain_timeout, log)
            stack.close()
        log.info("stopped")


def _named(bundles: Sequence[str]) -> dict[str, Path]:
    """``[NAME=]BUNDLE`` by name, its manifest's where none was said. Raises ``BadInput`` and ``BadBundle``."""
    from tstitch_engines.bundle.bundle import open_bundle

    found: dict[str, Path] = {}
    for text in bundles:
        name, equals, path = text.partition("=")
        if not (equals and name and path) or Path(text).exists():
            path, name = text, open_bundle(text, "size", engines=False).manifest.name
        check_text(name, "name of a bundle", example="fashion", most=1000)
        if name in found:
            raise BadInput(
                f"{found[name]} and {path} are both called {shown(name)}", hint=f"give one another name: NAME={path}"
            )
        found[name] = Path(path)
    return found


def _told(log: Logger) -> Progress:
    """Progress as lines of the log, at most one every 5 s."""
    last, told = 0.0, 0.0

    def tell(phase: str, share: float) -> None:
        nonlocal last, told
        if share > told and ((now := time.monotonic()) - last >= _TELL_SECONDS or share >= 1):
            last, told = now, share
            log.info("%s: %.0f %%", phase, 100 * share)

    return tell


def _next(signals: SimpleQueue[int], engine: Engine, answering: threading.Thread) -> int:
    """The next signal. Raises ``FailedWork`` when nothing can be drawn or answered any more."""
    while True:
        with suppress(Empty):
            return signals.get(timeout=_LOOK_SECONDS)
        failed = engine.state().failed
        if failed is not None or not answering.is_alive():
            why = "the thread that answers has ended" if failed is None else failed.partition("\nhint: ")[0]
            raise FailedWork(why, hint="start the server again")


def _reload(reload: Reloader) -> None:
    """Follows a reload that is running, which may have missed what the signal is about."""
    with suppress(FailedWork):  # each bundle's error has been logged
        reload(wait=True)


def _reload_over_http(reload: Reloader) -> tuple[str, ...]:
    """Raises ``ApiError``, which tells the client why: it has the key of an operator, or is on this machine."""
    from tstitch_trt.serve.http.errors import ApiError

    try:
        return reload()
    except (Busy, Closed):
        raise
    except FailedWork as failed:
        raise ApiError(500, str(failed), code="reload_failed") from None


def _drain(engine: Engine, seconds: float, log: Logger) -> None:
    """What was accepted is drawn, for at most so long."""
    engine.drain()
    try:
        engine.close(timeout=seconds)
    except Busy as late:
        log.warning("%s: cancelled", late.message)
        engine.close(cancel=True)
