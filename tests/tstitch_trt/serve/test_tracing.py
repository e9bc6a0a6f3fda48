"""Where traces go, by OpenTelemetry's variables. The spans themselves: ``test_serve_command.py``."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.tracing import Traces, provider_of_environment

pytest.importorskip("opentelemetry.sdk")


def test_without_variables_there_are_no_traces() -> None:
    assert provider_of_environment({}) is None
    assert provider_of_environment({"OTEL_TRACES_EXPORTER": "none"}) is None
    assert provider_of_environment({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}) is None


def test_console() -> None:
    provider = provider_of_environment({"OTEL_TRACES_EXPORTER": "console"})
    assert provider is not None
    provider.shutdown()  # type: ignore[attr-defined]


def test_two_requests_with_the_id_of_a_client_have_a_span_each() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces, plan, nothing = Traces(provider), cast(Any, SimpleNamespace(steps=1, schedule="small")), cast(Any, None)
    both = [
        Handle("mine", "m", plan, SampleOptions(), 1, priority=0, deadline=None, adapted=None, estimate=0.0,
               cancel=nothing)
        for _ in range(2)
    ]  # fmt: skip
    for handle in both:
        traces.submitted(handle)
    for handle in both:
        traces.stage(handle, "queue", 0.0, 1.0)
        traces.finished(handle)
    spans = exporter.get_finished_spans()
    drawn = [span.context.span_id for span in spans if span.name == "draw"]
    queues = [span.parent.span_id for span in spans if span.name == "queue" and span.parent is not None]
    assert len(set(drawn)) == 2
    assert queues == drawn


def test_an_exporter_that_is_not_known_is_refused() -> None:
    with pytest.raises(BadInput, match="OTEL_TRACES_EXPORTER is 'zipkin'; allowed are otlp, console and none"):
        provider_of_environment({"OTEL_TRACES_EXPORTER": "zipkin"})


@pytest.mark.parametrize(
    ("missing", "environment"),
    [
        ("opentelemetry.sdk.trace", {"OTEL_TRACES_EXPORTER": "console"}),
        ("opentelemetry.exporter", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}),
    ],
)
def test_what_is_asked_for_and_not_installed_is_named(
    missing: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Unavailable) as caught:
        provider_of_environment(environment)
    assert "tstitch-trt[otel]" in caught.value.hint
