"""Where traces go, by OpenTelemetry's variables. The spans themselves: ``test_serve_command.py``."""

from __future__ import annotations

import sys

import pytest

from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.serve.tracing import provider_of_environment

pytest.importorskip("opentelemetry.sdk")


def test_without_variables_there_are_no_traces() -> None:
    assert provider_of_environment({}) is None
    assert provider_of_environment({"OTEL_TRACES_EXPORTER": "none"}) is None
    assert provider_of_environment({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}) is None


def test_console() -> None:
    provider = provider_of_environment({"OTEL_TRACES_EXPORTER": "console"})
    assert provider is not None
    provider.shutdown()  # type: ignore[attr-defined]


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
