"""What Prometheus reads: counts and times of an engine and of the answers over HTTP.

No client can make a label's value: models, members and batch sizes are the bundles', routes the server's, and all
other words are in the code. Counts live in a registry of this object's own, so that two servers in one process don't
share them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.needs import require
from tstitch_engines.version import VERSION
from tstitch_trt.serve.observer import Observer

if TYPE_CHECKING:
    from fastapi import APIRouter, Request, Response
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from tstitch_trt.serve.handle import Handle
    from tstitch_trt.serve.observer import EngineState, Rejection, TickInfo

__all__ = ["Metrics", "metrics_route"]

_METHODS: Final = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")
_STEP: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_OVERHEAD: Final = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)
_LATENCY: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)


class Metrics(Observer):
    """Given to an engine as its observer. ``watch`` adds what the engine holds at the moment of a scrape."""

    def __init__(self) -> None:
        client = require("prometheus_client", "/metrics", extra="serve")
        self.registry: CollectorRegistry = client.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> _Children:
            return _Children(client.Counter(f"tstitch_{name}", text, labels, registry=self.registry))

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> _Children:
            return _Children(client.Histogram(f"tstitch_{name}", text, labels, buckets=buckets, registry=self.registry))

        self._accepted = counter("requests_accepted", "Requests taken into the queue.", "model")
        self._rejected = counter("requests_rejected", "Requests refused, by reason.", "model", "reason")
        self._finished = counter(
            "requests_finished", "Requests that ended: done, failed or cancelled.", "model", "outcome"
        )
        self._images = counter("images_drawn", "Images of requests that were done.", "model")
        self._adapted = counter("requests_adapted", "Requests given a cheaper schedule under load.", "model")
        self._missed = counter("deadline_misses", "Requests that were not done within their latency budget.", "model")
        self._latency = histogram("request_seconds", "From submit to the end, of requests done.", _LATENCY, "model")
        self._stages = histogram(
            "stage_seconds", "In queue, encode, denoise and decode, of requests done.", _LATENCY, "model", "stage"
        )
        self._steps = histogram("step_seconds", "One step of one batch.", _STEP, "model", "member", "guided", "bucket")
        self._overhead = histogram(
            "tick_overhead_seconds", "Of a tick beside its step: choosing lanes, admitting.", _OVERHEAD, "model"
        )
        self._lanes = counter("step_lanes", "Lanes that took a step, summed over batches.", "model", "member")
        self._places = counter(
            "step_places", "Places of the batches that ran: step_lanes over this is the fill.", "model", "member"
        )
        self._responses = counter("http_responses", "Answers over HTTP.", "method", "route", "status")
        client.Info("tstitch_build", "What runs.", registry=self.registry).info(
            {"version": VERSION, "python": platform.python_version()}
        )
        for kind in (client.ProcessCollector, client.GCCollector):
            kind(registry=self.registry)

    def watch(self, state: Callable[[], EngineState]) -> None:
        """``state``: of the engine, read at every scrape."""
        self.registry.register(_Held(state))

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics for who accepts it, else Prometheus' text."""
        from prometheus_client.exposition import choose_encoder

        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind

    def answered(self, method: str, route: str, status: int) -> None:
        """``route``: the server's pattern of the path, not the path."""
        self._responses(method if method in _METHODS else "other", route, str(status)).inc()

    # --- of the engine

    def submitted(self, handle: Handle) -> None:
        self._accepted(handle.model).inc()
        if handle.adapted is not None:
            self._adapted(handle.model).inc()

    def rejected(self, why: Rejection, model: str) -> None:
        self._rejected(model, why).inc()

    def ticked(self, tick: TickInfo) -> None:
        self._steps(tick.model, tick.member, str(tick.guided).lower(), str(tick.bucket)).observe(tick.seconds)
        self._overhead(tick.model).observe(tick.overhead)
        self._lanes(tick.model, tick.member).inc(tick.lanes)
        self._places(tick.model, tick.member).inc(tick.bucket)

    def finished(self, handle: Handle) -> None:
        self._finished(handle.model, handle.state).inc()
        if handle.deadline is not None and handle.state != "cancelled" and time.monotonic() > handle.deadline:
            self._missed(handle.model).inc()
        if handle.state == "done":
            times = handle.times
            self._latency(handle.model).observe(times.total)
            for stage, seconds in (("queue", times.queued), ("encode", times.encode), ("denoise", times.denoise),
                                   ("decode", times.decode)):  # fmt: skip
                self._stages(handle.model, stage).observe(seconds)
            self._images(handle.model).inc(handle.n)


class _Children:
    """A metric's children by the values of its labels: looking one up takes no lock."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._known: dict[tuple[str, ...], Any] = {}

    def __call__(self, *labels: str) -> Any:
        child = self._known.get(labels)
        if child is None:
            child = self._known[labels] = self._metric.labels(*labels)
        return child


class _Held:
    """What an engine holds now, as gauges (a collector of ``prometheus_client``)."""

    def __init__(self, state: Callable[[], EngineState]) -> None:
        self._state = state

    def describe(self) -> Iterator[Metric]:
        return iter(self._families())

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        (ready, draining, requests, images, size, backlog, most, lanes) = families = self._families()
        ready.add_metric([], float(state.ready))
        draining.add_metric([], float(state.draining))
        for model, held in state.models.items():
            requests.add_metric([model], held.open)
            images.add_metric([model], held.waiting_images)
            size.add_metric([model], held.waiting_bytes)
            backlog.add_metric([model], held.backlog_seconds)
            most.add_metric([model], held.max_lanes)
            for member, count in held.lanes_by_member.items():
                lanes.add_metric([model, member], count)
        return iter(families)

    def _families(self) -> list[Any]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"tstitch_{name}", text, labels=labels)

        return [
            gauge("ready", "1 when warm and admitting."),
            gauge("draining", "1 when nothing is admitted any more."),
            gauge("requests_in_flight", "Requests accepted and not ended.", "model"),
            gauge("images_waiting", "Images that wait for a lane.", "model"),
            gauge("waiting_bytes", "Host memory of what waits.", "model"),
            gauge("backlog_seconds", "What is accepted and not done, by the cost model.", "model"),
            gauge("lanes_max", "Lanes there are.", "model"),
            gauge("lanes", "Lanes in use, by the member of their next step.", "model", "member"),
        ]


def metrics_route(metrics: Metrics) -> APIRouter:
    """``GET /metrics``."""
    fastapi = require("fastapi", "the server", extra="serve")
    router: APIRouter = fastapi.APIRouter()

    def scrape(request: Request) -> Response:
        content, kind = metrics.render(request.headers.get("accept", ""))
        found: Response = fastapi.Response(content, media_type=kind)
        return found

    scrape.__annotations__.update(request=fastapi.Request)  # FastAPI reads annotations as objects, and ours are text
    router.add_api_route("/metrics", scrape, methods=["GET"], summary="For Prometheus", response_class=fastapi.Response)
    return router
