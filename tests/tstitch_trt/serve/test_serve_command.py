"""``tstitch-trt serve`` as its operator has it: a process, its signals, its log and its metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.browser import browser_page
from support.command import Command, refused
from support.served import Served, served

KEY = "a-key-of-the-tests"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_what_can_not_be_served_is_refused_before_anything_is_loaded(
    run: Command, fashion_bundle: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(run("serve", fashion_bundle, "--port", port), f"127.0.0.1:{port}", "--port 0")
    for host in ("0.0.0.0", "::", "10.0.0.1"):  # noqa: S104
        refused(run("serve", fashion_bundle, "--host", host), host, "--api-key-file", "--insecure")
    short = tmp_path / "keys.txt"
    short.write_text("# none of 16 characters\nshort\n")
    assert "short" not in run("serve", fashion_bundle, "--api-key-file", short).err.replace("keys.txt", "")
    refused(run("serve", fashion_bundle, "--api-key-file", short), "line 2")
    refused(run("serve", fashion_bundle, fashion_bundle), "both called", "NAME=")
    refused(run("serve", fashion_bundle, "--weight", "other=2"), "other", "fashion")
    refused(run("serve", fashion_bundle, "--weight", "fashion=x"), "weight")
    refused(run("serve", fashion_bundle, "--root-path", "images"), "root_path")
    refused(run("serve", fashion_bundle, "--max-steps", "0"), "--max-steps")
    refused(run("serve", fashion_bundle, "--max-body", "much"), "much", "--max-body")
    refused(run("serve", fashion_bundle, "--max-queue-memory", "much"), "much", "--max-queue-memory")
    refused(run("serve", fashion_bundle, "--max-fraction", "2"), "--max-fraction", "from 0 to 1")
    refused(run("serve", tmp_path / "none.bundle", "--max-body", "1GiB"), "none.bundle")
    refused(run("serve"), "BUNDLE")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_without_the_extra_it_is_refused_by_name(run: Command, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    refused(run("serve", "a.bundle"), missing, "tstitch-trt[serve]")


# --- one server, from its start to its end


@pytest.fixture(scope="module")
def bundle(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(fashion_bundle, tmp_path_factory.mktemp("serve") / "fashion.bundle"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Served]:
    keys = bundle.parent / "keys.txt"
    keys.write_text(f"# of the tests\nanother-key-of-the-tests\n{KEY}\n")
    with served(bundle, log=bundle.parent / "log.txt", options=("--api-key-file", str(keys)), key=KEY) as found:
        yield found


@pytest.fixture
def warm(server: Served) -> Served:
    server.until(lambda: server.ready() == 200)
    return server


def test_until_it_is_warm_it_lives_and_is_not_ready(server: Served) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok"}
    early = server.draw()
    if early.status_code != 200:  # a fast machine may be ready by now
        assert early.status_code == 503
        assert early.json()["error"]["code"] == "not_ready"
        assert "fashion" not in early.text, "told to who has no key"
        assert int(early.headers["retry-after"]) > 0
    server.until(lambda: server.ready() == 200)
    assert server.messages[0] == "loading fashion"
    assert "warming up: 100 %" in server.messages
    assert "ready: fashion" in server.messages


def test_who_has_no_key_learns_nothing(warm: Served) -> None:
    for key in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY):
        for method, path in (("POST", "/v1/images/generations"), ("GET", "/v1/models"), ("POST", "/admin/reload")):
            answer = warm.client.request(method, path, headers={"authorization": key}, json={"n": 1})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "fashion" not in answer.text
    assert warm.client.get("/v1/models", headers={"authorization": "Bearer another-key-of-the-tests"}).json()["data"]
    assert KEY not in warm.log


def test_metrics_count_what_was_asked(warm: Served) -> None:
    before = warm.metrics()

    def since(name: str) -> float:
        return warm.metrics().get(name, 0.0) - before.get(name, 0.0)

    drawn = warm.draw(n=2, class_labels=[1, 2], steps=4, fraction=0.5)
    assert drawn.status_code == 200, drawn.text
    assert warm.draw(steps=10**6).status_code == 400
    assert warm.draw(latency_budget_ms=1, steps=200).status_code == 400, "no time helps"
    assert warm.draw(model="no-such-model-" + "x" * 50).status_code == 404
    assert warm.client.get("/no/such/path").status_code == 404
    model = 'model="fashion"'
    assert since(f"tstitch_requests_accepted_total{{{model}}}") == 1
    assert since(f'tstitch_requests_finished_total{{{model},outcome="done"}}') == 1
    assert since(f'tstitch_requests_rejected_total{{{model},reason="budget"}}') == 1
    assert since(f"tstitch_images_drawn_total{{{model}}}") == 2
    assert since(f"tstitch_request_seconds_count{{{model}}}") == 1
    assert since(f"tstitch_tick_overhead_seconds_count{{{model}}}") == 4
    for stage in ("queue", "encode", "denoise", "decode"):
        assert since(f'tstitch_stage_seconds_count{{{model},stage="{stage}"}}') == 1
    for member in ("small", "large"):
        assert since(f'tstitch_step_lanes_total{{member="{member}",{model}}}') == 4, "two images, two steps each"
        assert since(f'tstitch_step_places_total{{member="{member}",{model}}}') >= 4
        assert since(f'tstitch_step_seconds_count{{bucket="2",guided="true",member="{member}",{model}}}') == 2
    now = warm.metrics()
    assert (now["tstitch_ready"], now["tstitch_draining"]) == (1, 0)
    assert now[f"tstitch_requests_in_flight{{{model}}}"] == now[f"tstitch_backlog_seconds{{{model}}}"] == 0
    answers = 'tstitch_http_responses_total{method="POST",route="/v1/images/generations",status="%d"}'
    assert (since(answers % 200), since(answers % 400), since(answers % 404)) == (1, 2, 1)
    assert not [name for name in now if "no-such" in name or "/no/such" in name], "a client made a label's value"
    page = warm.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    assert page.text.endswith("# EOF\n")


def test_a_request_has_one_line_in_the_log(warm: Served) -> None:
    body = {"class_labels": [7], "steps": 3, "fraction": 1.0, "user": "somebody"}
    answer = warm.client.post("/v1/images/generations", headers={"x-request-id": "mine-1"}, json=body)
    assert answer.headers["x-request-id"] == "mine-1"
    warm.until(lambda: any(line.get("request_id") == "mine-1" for line in warm.lines))  # written after the answer
    (line,) = (line for line in warm.lines if line.get("request_id") == "mine-1")
    assert (line["model"], line["images"], line["steps"], line["status"]) == ("fashion", 1, 3, 200)
    assert (line["schedule"], line["outcome"], line["client"]) == ("small[0:3]", "done", "127.0.0.1")
    assert 0 < line["denoise"] <= line["seconds"]
    assert "somebody" not in warm.log
    assert not [line for line in warm.lines if line.get("route") in ("/healthz", "/metrics")]


def test_a_client_that_hangs_up_is_counted(warm: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        warm.client.post("/v1/images/generations", json={"steps": 250, "n": 4}, timeout=0.3)
    cancelled = 'tstitch_requests_finished_total{model="fashion",outcome="cancelled"}'
    warm.until(lambda: warm.metrics().get(cancelled) == 1)
    warm.until(lambda: not warm.metrics().get('tstitch_lanes{member="large",model="fashion"}'))
    warm.until(lambda: any(line.get("outcome") == "cancelled" for line in warm.lines))
    (line,) = (line for line in warm.lines if line.get("outcome") == "cancelled")
    assert (line["status"], line["hung_up"]) == (499, True)


def test_a_changed_bundle_takes_over_while_requests_run(warm: Served, bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    first = manifest.read_text()
    steps = json.loads(first)["defaults"]["steps"]

    def served_steps() -> int:
        return int(warm.client.get("/v1/models/fashion").json()["steps"])

    def changed(steps: int) -> str:
        found = json.loads(first)
        return json.dumps({**found, "defaults": {**found["defaults"], "steps": steps}})

    def loaded(text: str) -> None:
        whole = manifest.with_name("manifest.new")
        whole.write_text(text)
        whole.replace(manifest)

    def reload() -> httpx.Response:
        """Asks again on 429: what a reload loaded is seen before the reload has ended."""
        answers = []

        def accepted() -> bool:
            answers.append(warm.client.post("/admin/reload"))
            return answers[-1].status_code != 429

        warm.until(accepted)
        return answers[-1]

    assert reload().json()["models"] == []
    stop = threading.Event()

    def draw() -> list[int]:
        found = []
        while not stop.is_set():
            found.append(warm.draw(steps=3).status_code)
        return found

    with ThreadPoolExecutor(2) as pool:
        drawing = [pool.submit(draw) for _ in range(2)]
        try:
            loaded(changed(steps + 1))
            warm.process.send_signal(signal.SIGHUP)
            warm.until(lambda: "loading fashion again" in warm.messages)
            loaded(changed(steps + 2))
            warm.process.send_signal(signal.SIGHUP)
            warm.until(lambda: served_steps() == steps + 2)
            loaded("{ no manifest")
            answer = reload()
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "reload_failed"
            assert "fashion" in answer.json()["error"]["message"]
            assert str(bundle.parent) not in answer.text
            warm.process.send_signal(signal.SIGHUP)
            said = "fashion could not be loaded again, and is served as it was"
            warm.until(lambda: warm.messages.count(said) == 2)
            assert served_steps() == steps + 2
            loaded(first)
            assert reload().json()["models"] == ["fashion"]
            assert served_steps() == steps
        finally:
            stop.set()
        codes = [code for each in drawing for code in each.result(60)]
    assert len(codes) > 4
    assert set(codes) == {200}


def test_sigterm_finishes_what_was_accepted_and_exits_0(warm: Served) -> None:
    accepted = 'tstitch_requests_accepted_total{model="fashion"}'
    before = warm.metrics()[accepted]
    with ThreadPoolExecutor(5) as pool:
        asked: list[Future[httpx.Response]] = [pool.submit(warm.draw, steps=150, seed=0)]
        asked += [pool.submit(warm.draw, n=2, steps=12, seed=10 * index) for index in range(1, 5)]
        warm.until(lambda: warm.metrics()[accepted] == before + 5)
        warm.process.send_signal(signal.SIGTERM)
        warm.until(lambda: warm.ready() == 503)
        refusal = warm.draw()
        assert refusal.status_code == 503
        assert "retry-after" in refusal.headers
        answers = [each.result(60) for each in asked]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert [answer.json()["tstitch"]["seeds"][0] for answer in answers] == [0, 10, 20, 30, 40]
    assert warm.process.wait(30) == 0, warm.told()
    assert "SIGTERM: finishing what was accepted" in warm.messages
    assert warm.messages[-1] == "stopped"
    assert "Traceback" not in warm.log


# --- another one: what the page tells people to type, traces, and an end that waits for nobody


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Another site: its origin, and the folder it shows."""
    folder = tmp_path_factory.mktemp("site")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


@pytest.fixture(scope="module")
def traced(fashion_bundle: Path, site: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Without keys, and without a warm-up."""
    pytest.importorskip("opentelemetry.sdk")
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    options = ("--no-warm-up", "--cors-origin", site[0])
    log = tmp_path_factory.mktemp("traced") / "log.txt"
    with served(fashion_bundle, log=log, options=options, environment=environment) as found:
        found.until(lambda: found.ready() == 200)
        yield found


def test_the_html_of_the_page(traced: Served, site: tuple[str, Path]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "serve.md").read_text()
    (example,) = re.findall(r"```html\n(.*?)```", page, re.DOTALL)
    assert "http://127.0.0.1:8000/" in example
    origin, folder = site
    (folder / "index.html").write_text(
        "<!doctype html><link rel='icon' href='data:,'>" + example.replace("http://127.0.0.1:8000/", traced.address)
    )
    with browser_page() as seen:
        seen.page.goto(f"{origin}/")
        seen.page.wait_for_function("document.title == 'drawn' && picture.naturalWidth == 28")
        assert seen.errors == []
        # Chromium at times calls a stream aborted that the page has read to its end
        assert [text for text in seen.failed if not text.endswith("generations: net::ERR_ABORTED")] == []


def test_a_request_is_a_trace(traced: Served) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body, headers = {"steps": 4, "fraction": 0.5, "n": 1}, {"traceparent": f"00-{trace}-{parent}-01"}
    assert traced.client.post("/v1/images/generations", json=body, headers=headers).status_code == 200

    def spans() -> dict[str, Any]:
        lines = (line for line in traced.lines if line.get("context", {}).get("trace_id") == f"0x{trace}")
        return {line["name"]: line for line in lines}

    parts = {"queue", "encode", "denoise", "decode", "steps of small", "steps of large"}
    traced.until(lambda: spans().keys() >= {"POST /v1/images/generations", "draw", *parts})
    seen = spans()
    assert set(seen) == {"POST /v1/images/generations", "draw", *parts}
    outer, drawing = seen["POST /v1/images/generations"], seen["draw"]
    assert outer["parent_id"] == f"0x{parent}"
    assert drawing["parent_id"] == outer["context"]["span_id"]
    assert {seen[name]["parent_id"] for name in parts} == {drawing["context"]["span_id"]}
    small, large = seen["steps of small"], seen["steps of large"]
    assert drawing["start_time"] <= small["start_time"] <= small["end_time"] <= large["end_time"]
    assert large["end_time"] <= drawing["end_time"] <= outer["end_time"]


def test_a_second_sigterm_ends_it_at_once(traced: Served) -> None:
    def cut_off() -> int:
        try:
            return traced.draw(steps=250, n=8).status_code
        except httpx.TransportError:
            return 0

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cut_off)
        traced.until(lambda: traced.metrics()['tstitch_requests_in_flight{model="fashion"}'] == 1)
        traced.process.send_signal(signal.SIGTERM)
        traced.until(lambda: traced.ready() == 503)
        traced.process.send_signal(signal.SIGTERM)
        assert traced.process.wait(10) == 143
        assert asked.result(10) == 0
    assert traced.log.endswith("terminated\n")


# --- others


def test_ended_while_it_loads_it_has_lost_nothing(fashion_bundle: Path, tmp_path: Path) -> None:
    with served(fashion_bundle, log=tmp_path / "log.txt") as found:
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(30) == 0, found.log
        assert found.messages[-1] == "stopped before it was ready"
        assert "Traceback" not in found.log


# A signal while an extension module is being imported comes out as that module's ImportError.
IMPORTING = """
import os, signal, sys
from tstitch_trt.serve import engine

def load(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        raise ImportError("initialization of _module raised an exception") from None

engine.load_runtime = load
from tstitch_trt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ended_while_it_imports_too(fashion_bundle: Path, tmp_path: Path) -> None:
    with served(fashion_bundle, log=tmp_path / "log.txt", program=("-c", IMPORTING)) as found:
        assert found.process.wait(30) == 0, found.log
        assert found.messages[-1] == "stopped before it was ready"


def test_what_takes_longer_than_the_drain_is_cancelled(fashion_bundle: Path, tmp_path: Path) -> None:
    """And with --insecure, of a server that other machines reach."""
    options = ("--no-warm-up", "--drain-timeout", "0.2", "--host", "0.0.0.0", "--insecure")  # noqa: S104
    with served(fashion_bundle, log=tmp_path / "log.txt", options=options) as found, ThreadPoolExecutor(1) as pool:
        found.until(lambda: found.ready() == 200)
        asked = pool.submit(found.draw, steps=250, n=8)
        found.until(lambda: found.metrics()['tstitch_requests_in_flight{model="fashion"}'] == 1)
        found.process.send_signal(signal.SIGTERM)
        assert asked.result(30).status_code == 503
        assert found.process.wait(30) == 0, found.log
        assert "1 requests have not ended after 0.2 s: cancelled" in found.messages


# The first step loses the device, and the bundle can't be loaded again.
LOST = """
import sys
from tstitch_engines.errors import DeviceLost
from tstitch_trt.runtime.lane_runner import LaneRunner
from tstitch_trt.serve import engine

def lost(*_, **__):
    engine.load_runtime = lost
    raise DeviceLost("it fell off the bus", hint="none")

LaneRunner.step = lost
from tstitch_trt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_engine_that_has_failed_for_good_ends_the_process(fashion_bundle: Path, tmp_path: Path) -> None:
    """So that whoever watches it starts another."""
    with served(fashion_bundle, log=tmp_path / "log.txt", options=("--no-warm-up",), program=("-c", LOST)) as found:
        found.until(lambda: found.ready() == 200)
        answer = found.draw()
        assert answer.status_code >= 500
        assert "bus" not in answer.text
        assert found.process.wait(30) == 1
        error, hint = found.log.splitlines()[-2:]
        assert error.startswith("error: ")
        assert "the device is lost" in error
        assert hint == "hint: start the server again"
