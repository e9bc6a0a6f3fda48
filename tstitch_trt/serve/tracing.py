"""Traces of OpenTelemetry: a span for each request over HTTP, and below it one for its drawing, each of its stages
(queue, encode, denoise, decode) and each member's part of the steps.

OpenTelemetry's own variables say where spans go: ``OTEL_TRACES_EXPORTER`` (``otlp``, ``console`` or ``none``),
``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``... Without them there are no traces,
unless the program that embeds the server has set a tracer provider.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.errors import BadInput
from tstitch_engines.needs import require
from tstitch_trt.serve.observer import Observer

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

    from tstitch_trt.serve.handle import Handle

__all__ = ["Traces", "provider_of_environment"]

_EXTRA: Final = "otel"


def provider_of_environment(environment: Mapping[str, str] | None = None) -> TracerProvider | None:
    """The tracer provider that the environment asks for, or that the program has set; ``None`` for no traces.

    Raises ``Unavailable`` where OpenTelemetry is asked for and not installed, and ``BadInput`` for an exporter that is
    not known.
    """
    environment = os.environ if environment is None else environment
    asked = environment.get("OTEL_TRACES_EXPORTER", "")
    endpoint = any(environment.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_"))
    if asked == "none" or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if not asked and not endpoint:
        return _provider_of_program()
    if asked not in ("", "otlp", "console"):
        raise BadInput(
            f"OTEL_TRACES_EXPORTER is {asked[:80]!r}; allowed are otlp, console and none",
            hint="OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318",
        )
    sdk = require("opentelemetry.sdk.trace", "OTEL_TRACES_EXPORTER", extra=_EXTRA)
    export = require("opentelemetry.sdk.trace.export", "OTEL_TRACES_EXPORTER", extra=_EXTRA)
    resources = require("opentelemetry.sdk.resources", "OTEL_TRACES_EXPORTER", extra=_EXTRA)
    service = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "tstitch-trt"}
    provider: Any = sdk.TracerProvider(resource=resources.Resource.create(service))
    if asked == "console":
        import sys

        exporter = export.ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n")
    else:
        name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
        exporter = require(name, "traces over OTLP", extra=_EXTRA).OTLPSpanExporter()
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    found: TracerProvider = provider
    return found


def _provider_of_program() -> TracerProvider | None:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else provider


class Traces(Observer):
    """Given to an engine as its observer, and to what answers over HTTP. ``provider`` makes the spans."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("tstitch_trt")
        self._incoming = TraceContextTextMapPropagator()
        self._open: dict[Handle, Span] = {}  # an id may be there twice: it is the client's
        self._lock = threading.Lock()

    def close(self) -> None:
        """Sends what is left."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            shutdown()

    @contextmanager
    def answering(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> Iterator[Span]:
        """A span for an answer over HTTP, current while the block runs; below the caller's, where a header
        ``traceparent`` names one."""
        carrier = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers
                   if name.lower() in (b"traceparent", b"tracestate")}  # fmt: skip
        with self._tracer.start_as_current_span(
            method, context=self._incoming.extract(carrier), kind=self._trace.SpanKind.SERVER
        ) as span:
            yield span

    # --- of the engine

    def submitted(self, handle: Handle) -> None:
        span = self._tracer.start_span("draw", attributes={
            "tstitch.request_id": handle.id, "tstitch.model": handle.model, "tstitch.images": handle.n,
            "tstitch.steps": handle.plan.steps, "tstitch.schedule": str(handle.plan.schedule),
        })  # fmt: skip
        with self._lock:
            self._open[handle] = span

    def stage(self, handle: Handle, name: str, began: float, ended: float) -> None:
        self._record(handle, name, began, ended)

    def phase(self, handle: Handle, member: str, began: float, ended: float) -> None:
        self._record(handle, f"steps of {member}", began, ended)

    def finished(self, handle: Handle) -> None:
        with self._lock:
            span = self._open.pop(handle, None)
        if span is None:
            return
        span.set_attribute("tstitch.outcome", handle.state)
        if handle.adapted is not None:
            span.set_attribute("tstitch.adapted", handle.adapted)
        if handle.state != "done":
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, handle.state))
        span.end()

    def _record(self, handle: Handle, name: str, began: float, ended: float) -> None:
        """A span that has ended already. ``began``, ``ended``: of ``time.monotonic``."""
        parent = self._open.get(handle)
        if parent is None or not parent.is_recording():
            return
        epoch = time.time() - time.monotonic()
        within = self._trace.set_span_in_context(parent)
        span = self._tracer.start_span(name, context=within, start_time=round((began + epoch) * 1e9))
        span.end(round((ended + epoch) * 1e9))
