"""``tstitch-trt ui``: what it draws is what the runtime draws, the page works in a browser and asks nobody else."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.browser import Watched, browser_page, pixels
from support.command import Command, refused
from support.page_client import DRAW, PLOT, Visitor, raw
from support.report_studies import evaluation
from support.studies import search, search_point
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.gather import Studies
from tstitch_trt.study.store import save_study, weights_of
from tstitch_trt.ui.draw import enlarged, kept
from tstitch_trt.ui.pareto import pareto

HOSTILE = "</script><img src=x onerror=document.title='run'>${document.title='run'} {{1}} `b` [a](javascript:x)"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="module")
def runtime(fashion_bundle: Path) -> Iterator[Runtime]:
    with tstitch_trt.load(fashion_bundle, threads=1) as loaded:
        yield loaded


# --- what is drawn


def test_small_pictures_are_enlarged_pixel_by_pixel() -> None:
    image = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28, 1)
    large = enlarged(image)
    assert large.shape == (224, 224, 3)
    np.testing.assert_array_equal(large[::8, ::8, 1], image[..., 0])
    assert enlarged(np.zeros((512, 300, 3), np.uint8)).shape == (512, 300, 3)


def test_a_picture_s_file_is_written_once(tmp_path: Path) -> None:
    """The browser may be reading it when the next one is drawn."""
    first, other = np.zeros((28, 28, 1), np.uint8), np.ones((28, 28, 1), np.uint8)
    path = kept(first, tmp_path)
    before = path.stat()
    assert kept(first, tmp_path) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert kept(other, tmp_path) != path
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), enlarged(first))


def test_the_folder_of_pictures_is_bounded(tmp_path: Path) -> None:
    def drawn(value: int, **bound: int) -> Path:
        return kept(np.full((28, 28, 1), value, np.uint8), tmp_path, **bound)

    first, second, third = (drawn(value, most=3) for value in range(3))
    os.utime(second, ns=(1, 1))
    assert drawn(0, most=3) == first  # is used again
    drawn(3, most=3)
    assert first.exists()
    assert not second.exists()
    last = drawn(4, most_bytes=1)  # the one that is about to be shown stays
    assert list(tmp_path.iterdir()) == [last]
    assert not third.exists()


# --- the plot


def test_the_chosen_point_is_ringed_where_it_was_measured(runtime: Runtime) -> None:
    weights = weights_of(runtime.manifest)
    for studies in (Studies(searches=(search(weights=weights),)), Studies(evaluations=(evaluation(weights=weights),))):
        measured = pareto(
            runtime, studies, "a.bundle", runtime.plan(fraction=0.4, steps=10, guidance=1.0), guidance=1.0
        )
        assert "chosen: small:4,large:6, 10 steps" in measured
        assert "<code>small:4,large:6</code>, 10 steps. Fréchet distance" in measured
        for other in ({"fraction": 0.3}, {"steps": 20}, {"solver": "euler"}):
            plan = runtime.plan(**{"fraction": 0.4, "steps": 10, **other})
            text = pareto(runtime, studies, "a.bundle", plan, guidance=1.0)
            assert "chosen: " not in text
            assert "this schedule was not measured" in text


def test_without_studies_the_commands_are_said(runtime: Runtime) -> None:
    text = pareto(runtime, Studies(), "my a.bundle", runtime.plan(fraction=0.4), guidance=1.0)
    for word in ("evaluate", "search", "calibrate"):
        assert f"tstitch-trt {word} &#39;my a.bundle&#39;" in text
    assert "<svg" not in text


# --- the command


def test_bad_input_is_refused(run: Command, fashion_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(run("ui", fashion_bundle, "--port", port), f"127.0.0.1:{port}", "--port 0")
    refused(run("ui", fashion_bundle, "--host", "no such host"), "no such host", "127.0.0.1")
    refused(run("ui", fashion_bundle, "--port", 70000), "70000")


def test_without_gradio_it_is_refused_by_name(fashion_bundle: Path) -> None:
    script = "import sys; sys.modules['gradio'] = None\nfrom tstitch_trt.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["ui", str(fashion_bundle), "--port", "0"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tstitch-trt[ui]" in done.stderr


# --- in a browser


@pytest.fixture(scope="module")
def served(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """The address of a page over the built-in pair with a search, and its process. It is told to stop by Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('gradio is not installed (pip install "tstitch-trt[ui]")')
    root = tmp_path_factory.mktemp("ui") / "fashion.bundle"
    shutil.copytree(fashion_bundle, root)
    manifest = json.loads((root / "manifest.json").read_bytes())
    manifest["name"] = HOSTILE
    manifest["conditioning"]["names"] = [f"{index} {HOSTILE}" for index in range(10)]
    (root / "manifest.json").write_text(json.dumps(manifest))
    bundle = open_bundle(root)
    points = [
        search_point(schedule, value, guidance=bundle.manifest.defaults.guidance)
        for schedule, value in (("small:10", 60.0), ("small:4,large:6", 20.0), ("large:10", 18.0))
    ]
    save_study(bundle, search(weights=weights_of(bundle.manifest), points=tuple(points)))
    log = root.parent / "log.txt"
    temporary = root.parent / "tmp"
    temporary.mkdir()
    with started(root, log, temporary) as (address, process):
        yield address, process
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert log.read_text() == "Ctrl-C stops it\nstopped\n"
        assert not list(temporary.glob("tstitch-ui-*"))  # the pictures it kept are gone


@contextmanager
def started(bundle: Path, log: Path, temporary: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address that the command printed, and its process."""
    words = [sys.executable, "-m", "tstitch_trt.cli", "ui", str(bundle), "--port", "0", "--threads", "1", *options]
    env = {**os.environ, "TMPDIR": str(temporary), "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "true"}
    with log.open("w") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), log.read_text()
        yield address, process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def opened(served: tuple[str, Any]) -> Iterator[Watched]:
    """One browser for both tests: it takes seconds to load Gradio's page for the first time."""
    with browser_page(viewport={"width": 1400, "height": 1000}) as seen:
        seen.page.context.set_default_timeout(120_000)
        yield seen


def test_what_a_visitor_writes_by_hand_is_refused_by_name(served: tuple[str, Any]) -> None:
    """The page's own bounds bind nobody; and what is refused leaves no trace of Python's anywhere."""
    address, _ = served
    with Visitor(address, "by-hand-1") as visitor:
        cases: dict[int, tuple[str, list[Any]]] = {
            0: ("share of the steps", [2, "x", None, [0.1]]), 1: ("beside it", [None, [0] * 16]),
            2: ("images per fraction", [9, 0, 1.5, "1", 10**9, True]), 3: ("steps", [201, 0, 10**9, None, 1e308]),
            4: ("seed", [-1, 1e30, "a"]), 5: ("guidance", [16, None]), 6: ("solver", ["no", 5, None]),
            7: ("class", [10, -1, 1e300, HOSTILE]),
        }  # fmt: skip
        for place, (name, values) in cases.items():
            for turn, value in enumerate(values):
                data = [*visitor.request[:place], value, *visitor.request[place + 1 :]]
                plotted = turn % 2 == 1 and place != 1
                joined = visitor.join([data[0], *data[2:]], PLOT) if plotted else visitor.join(data, DRAW)
                assert joined.status_code == 200
                said = visitor.outcome()
                assert not said["success"], (place, value)
                assert name in said["output"]["error"], said
                assert "<script" not in said["output"]["error"]
                assert "Traceback" not in json.dumps(said)
        for fields in ({"fn": 999}, {"fn": -1}, {"data": [{"path": "/etc/passwd"}] * 8}, {"data": []}):
            assert visitor.join(**fields).status_code == 422
        assert visitor.join().status_code == 200
        drawn = visitor.outcome()
        assert drawn["success"]
        shown = drawn["output"]["data"][0][0]["image"]
        assert visitor.client.get(shown["url"]).content.startswith(b"\x89PNG")
        folder = shown["path"].rpartition("/")[0]
        for path in (
            "/etc/passwd",
            f"{folder}/../../../../etc/passwd",
            "%2Fetc%2Fpasswd",
            folder,
            f"{folder}/",
            __file__,
        ):
            assert visitor.client.get(f"/gradio_api/file={path}").status_code == 404
        host = address.removeprefix("http://").strip("/")
        for line in (
            f"GET /gradio_api/file={folder}/../x.png",
            "GET /assets/../../../../../etc/passwd",
            "GET //etc/passwd",
        ):
            assert (
                b" 404 " in raw(address, f"{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())[:20]
            )
        upgrade = f"GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n"
        assert b" 101 " not in raw(address, upgrade.encode())[:20]
        assert visitor.client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert visitor.client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_visitors_who_draw_at_once_get_their_own_pictures(served: tuple[str, Any], runtime: Runtime) -> None:
    address, _ = served

    def drawn(label: int) -> np.ndarray:
        with Visitor(address, f"visitor-{label}", steps=4) as visitor:
            visitor.request[-1] = label
            assert visitor.join().status_code == 200
            url = visitor.outcome()["output"]["data"][0][0]["image"]["url"]
            return np.asarray(Image.open(io.BytesIO(visitor.client.get(url).content)))

    with ThreadPoolExecutor(4) as pool:
        for label, picture in enumerate(pool.map(drawn, range(4))):
            alone = runtime.sample(labels=[label], seed=0, steps=4, fraction=0.4, guidance=1.5, solver="ddim").images
            assert alone is not None
            np.testing.assert_array_equal(picture, enlarged(alone[0]))


def test_a_closed_page_s_drawing_ends_and_the_next_one_is_drawn(served: tuple[str, Any]) -> None:
    address, _ = served
    with Visitor(address, "leaves-early", steps=200, count=8) as first, Visitor(address, "stays-long") as second:
        first.request[1] = [0, 0.25, 0.5, 0.75, 1]
        assert first.join().status_code == 200
        with closing(first.messages()) as messages:
            next(message for message in messages if message["msg"] == "progress")
            assert first.join().status_code == 200
            refusal = next(message for message in messages if message["msg"] == "process_completed")
            assert "this page draws already" in refusal["output"]["error"]
        first.client.close()
        began = time.monotonic()
        assert second.join().status_code == 200
        assert second.outcome()["success"]
        assert time.monotonic() - began < 60  # the first would have been drawn for minutes


def test_a_page_with_a_token_that_is_terminated_while_it_draws(fashion_bundle: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('gradio is not installed (pip install "tstitch-trt[ui]")')
    token, log = tmp_path / "token.txt", tmp_path / "log.txt"
    token.write_text("a-token-of-the-test")
    with started(fashion_bundle, log, tmp_path, "--token-file", str(token)) as (printed, process):
        address, _, query = printed.partition("?")
        assert query == "token=a-token-of-the-test"
        with Visitor(address, "the-visitor", steps=200, count=8) as visitor:
            assert visitor.client.get("/").status_code == 401
            assert visitor.join().status_code == 401
            assert visitor.client.get("/", params={"token": "a-token-of-the-test"}).status_code == 200
            assert visitor.client.get("/").status_code == 200
            assert visitor.join().status_code == 200
            with closing(visitor.messages()) as messages:
                next(message for message in messages if message["msg"] == "progress")
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 143
        assert time.monotonic() - began < 15
        assert log.read_text() == "Ctrl-C stops it\nterminated\n"
        assert not list(tmp_path.glob("tstitch-ui-*"))


def assert_only_itself(seen: Watched, address: str) -> None:
    asked_of = {url.partition("?")[0] for url in seen.requests if not url.startswith(("data:", "blob:"))}
    assert all(url.startswith(address) for url in asked_of), asked_of
    # Gradio's page ends the stream of an event itself once it has the last message; and a preview that is replaced
    # while it is loaded is no failure.
    failed = [text for text in seen.failed if not ("/file=" in text and text.endswith("net::ERR_ABORTED"))]
    assert [text for text in failed if "/queue/data" not in text] == []
    assert seen.errors == []


def test_a_picture_is_drawn_by_pressing_the_button(served: tuple[str, Any], opened: Watched) -> None:
    page, (address, _) = opened.page, served
    page.goto(address)
    page.wait_for_selector("#plot svg")
    page.fill("#steps input[type=number]", "10")
    page.press("#steps input[type=number]", "Tab")
    page.wait_for_function("document.querySelector('#plot').innerHTML.includes('chosen: small:4,large:6')")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#pictures').innerText.split('ms per image').length == 4")
    page.wait_for_function(
        "[...document.querySelectorAll('#pictures img')].filter(i => i.naturalWidth == 224).length == 3"
    )
    captions = page.inner_text("#pictures")
    for text in ("0%: 10 large", "40%: 4 small + 6 large", "100%: 10 small", "ms per image"):
        assert text in captions
    for selector in ("#pictures", "#plot"):
        picture = pixels(page.locator(selector).screenshot())
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, selector
    page.wait_for_selector("#plot svg")
    assert page.title() == f"{HOSTILE}: stitch point"
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("[href^=javascript]").count() == 0
    assert_only_itself(opened, address)


def test_an_error_of_ours_is_shown_with_its_hint(served: tuple[str, Any], opened: Watched) -> None:
    address, process = served
    seen = Watched(opened.page.context.new_page())
    page = seen.page
    page.goto(address)
    page.wait_for_selector("#plot svg")
    page.fill("#steps input[type=number]", "200")
    page.press("#steps input[type=number]", "Tab")
    page.click("#solver input")
    page.get_by_role("option", name="lcm", exact=True).click()
    page.wait_for_selector(".toast-wrap >> text=hint:")
    assert "lcm" in page.inner_text(".toast-wrap")
    assert process.poll() is None
    assert_only_itself(seen, address)
